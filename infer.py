"""Caption images, ask about them or rank texts for them: edit the settings, then `python infer.py`. Each is also a flag."""

# Model and task
MODEL = ""  # hub name or folder of the base; empty: the base that the adapter was trained on
ADAPTER = "latest"  # an adapter file or run folder; "latest": the newest run of the task; "none": the base
SCALE = 1.0  # factor of the change that the adapter makes; 1: as trained; 0: the base
TASK = "auto"  # "caption", "vqa" or "retrieval"; "auto": the adapter's task, or that of the checkpoint

# Input
IMAGES = "image_test"  # a file, a folder, a glob, a list (.txt, .jsonl) or shards ("shards/{0000..0031}.tar")
QUESTION = ""  # vqa: one question for all images, or a file with lines {"image": …, "question": …}
TEXTS = ""  # rank these texts for every image: a file with a text per line, or texts separated by |
PROMPT = ""  # start of every caption; empty: the adapter's prompt; "none": no prompt
IMAGE_SIZE = 0  # side of the square images in pixels; 0: the adapter's setting, or the model's size

# Output
OUTPUT_DIR = ""  # folder of predictions.jsonl; empty: a new folder in lora_blip_output
RESUME = True  # continue an interrupted run in the same OUTPUT_DIR; False: stop if the folder has a run
REFERENCES = ""  # annotations with the right texts; the task's score is then printed
IMAGE_ROOT = ""  # folder that image paths of references or of a list are relative to; empty: the folder of the file
IMAGE_KEY = ""  # column or key of the image path; empty: a common name, such as image or file_name
TEXT_KEY = ""  # column or key of the text; empty: a common name, such as text or caption
QUESTION_KEY = ""  # column or key of the question; empty: question
ANSWER_KEY = ""  # column or key of the answers; empty: answers or answer
COMPARE = False  # run the base as well, and print both side by side
EXPLAIN = False  # write explain.html: each word with its probability and attention; at most 20 images

# Generation
MAX_NEW_TOKENS = 0  # largest number of generated tokens; 0: the adapter's setting, or 40
NUM_BEAMS = 0  # beams of beam search; 0: the adapter's setting, or 1
SAMPLE = False  # sample tokens at random; False: the adapter's setting, or greedy or beam search
SEED = 0  # seed of sampling
GENERATION = {}  # more options: {"num_beams": 3, "num_return_sequences": 3}; see docs/generation.md; empty: the adapter's

# Speed and memory
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1", "mps"
PRECISION = "auto"  # "fp16", "bf16" or "fp32"; "auto": the best for the device
BASE_DTYPE = "auto"  # frozen weights: "fp32", "bf16", "fp16", "int8" or "nf4"; "auto": as trained, or by the precision
BATCH_SIZE = 16  # images per batch; halved if the device runs out of memory
MERGE = True  # merge the adapter into the weights, which is faster; False: keep its hooks
FAST = True  # faster attention and matrix products, equal to transformers' up to rounding; False: transformers' own

if __name__ == "__main__":
    from lora_blip.cli import run_infer

    run_infer(globals(), __doc__)
