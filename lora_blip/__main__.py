from lora_blip.cli import main

main()
