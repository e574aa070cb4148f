"""Caption images, ask about them or rank texts for them: edit the settings, then `python infer.py`. Each is also a flag."""

MODEL = ""  # hub name or folder of the base; empty: the one that the adapter was trained on
ADAPTER = "latest"  # an adapter's file or run folder; "latest": the newest run; "none": the base as it is
TASK = "auto"  # "caption", "vqa" or "retrieval"; auto: the adapter's own, or what the checkpoint was made for
IMAGES = "image_test"  # a file, a folder, a glob, a list (.txt, .jsonl) or shards ("shards/{0000..0031}.tar")
QUESTION = ""  # vqa: asked of every image; or a file of lines {"image": …, "question": …}
TEXTS = ""  # rank these texts for every image: a file, a text a line, or texts with | between them
PROMPT = ""  # text that every caption goes on from; empty: the adapter's own; "none": no prompt
MAX_NEW_TOKENS = 0  # longest text; 0: the adapter's own setting, or 40
NUM_BEAMS = 0  # beams; 0: the adapter's own setting, or 1
IMAGE_SIZE = 0  # side of the square images in pixels; 0: the adapter's own, or the model's
SAMPLE = False  # draw words at random instead of taking the likeliest
BATCH_SIZE = 16  # images at a time; halved when the device's memory runs out
MERGE = True  # write the adapter into the weights first, which is faster; False: leave it on hooks
FAST = True  # attention and products by faster ways, equal to transformers' own up to rounding; False: transformers' own
COMPARE = False  # ask the base as well, and show both side by side
REFERENCES = ""  # an annotations file with the right texts: adds the task's score to what is printed
IMAGE_ROOT = ""  # folder that the references' image paths are relative to; empty: their own
OUTPUT_DIR = ""  # where predictions.jsonl goes; empty: a new folder in lora_blip_output
RESUME = True  # go on where a run into the same OUTPUT_DIR was stopped; False: refuse its folder
PRECISION = "auto"  # "fp16", "bf16" or "fp32"; auto: what the device does best
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1", "mps"
SEED = 0  # for sampling

if __name__ == "__main__":
    from lora_blip.cli import run_infer

    run_infer(globals(), __doc__)
