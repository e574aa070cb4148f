"""Train a LoRA adapter: edit the settings, then `python train.py`. Each is also a flag: --batch-size 8."""

# Base and task
MODEL = "assets/tiny-blip"  # hub name or folder: "Salesforce/blip-image-captioning-large", "Salesforce/blip2-opt-2.7b"
TASK = "auto"  # "caption", "vqa" or "retrieval"; "auto": the task that the checkpoint was trained for

# Data
ANNOTATIONS = "annotations.jsonl"  # lines of {"image": "red_1.jpg", "text": "a red cube"}; vqa: "question" and "answers"
IMAGE_ROOT = ""  # folder that image paths are relative to; empty: the annotations' folder
VAL_FRACTION = 0.1  # share of the images held out for validation; 0: none
PROMPT = ""  # text before every caption, not in the loss; vqa: a template, "Question: {question} Answer:"

# Adapter
TARGETS = "vit"  # modules to adapt: "vit", "vit,qformer", "text", "lm", "vit.q,vit.v", "vit[8:12]", "text:r=4", a regex
R = 8  # rank of the update
ALPHA = 32.0  # the update is scaled by alpha / r
DROPOUT = 0.0  # probability with which dropout zeroes an element of the adapters' input

# Training
EPOCHS = 30  # passes over the training images
MAX_STEPS = 0  # stop after this number of optimizer steps; 0: after the epochs
BATCH_SIZE = 8  # images in a micro-batch; retrieval: lines
ACCUMULATION = 1  # micro-batches in an optimizer step
LR = 0.0  # peak learning rate; 0: 1e-4, and for a tiny base 3e-3 (BLIP) or 1.5e-3 (BLIP-2)

# Run
OUTPUT_DIR = "lora_blip_output"  # folder in which each run creates its own folder
RESUME = "auto"  # "auto": the newest interrupted run with these settings; a run's folder: that run; "off": a new run
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1", "mps"
PRECISION = "auto"  # "fp16", "bf16" or "fp32"; "auto": the best for the device
SEED = 0  # seed of the split, the order, the augmentation and the initial adapters

# More: images
IMAGE_SIZE = 0  # side of the square images in pixels, with interpolated positions; 0: the model's own size
AUGMENT = True  # shift, scale and brighten images a little at random; also mirror, unless a text contains left or right
VIEWS = 0  # number of augmented versions of each image, cached and used in turn; 0: a new version in every epoch
VAL_ANNOTATIONS = ""  # annotations of the validation images; empty: VAL_FRACTION of the images
GROUP_BY = ""  # keep the images of a group together: "folder", a column such as "video", or a regex such as "(video[0-9]+)"
IMAGE_KEY = ""  # column or key of the image path; empty: a common name, such as image or file_name
TEXT_KEY = ""  # column or key of the text; empty: a common name, such as text or caption
QUESTION_KEY = ""  # column or key of the question; empty: question
ANSWER_KEY = ""  # column or key of the answers; empty: answers or answer
ON_BAD_DATA = "stop"  # if a line of the annotations is invalid: "stop" or "skip" the line
CHECK_IMAGES = "all"  # "all": decode all images before the first step; "lazy": decode when needed, stop at a broken image
NUM_WORKERS = -1  # processes that load images; 0: none; -1: none for a model on the CPU, else one per core, up to 16

# More: adapter
VARIANT = "lora"  # "lora"; "rslora": scaled by alpha / √r; "dora": trains the norms of W's rows too; see docs/variants.md
LR_RATIO = 1.0  # LoRA+: learning rate of B as a multiple of that of A; 1: equal rates

# More: optimizer
WARMUP_STEPS = 20  # optimizer steps of linear warm-up before the cosine decay; at most a fifth of all steps
WEIGHT_DECAY = 0.01  # AdamW's decoupled weight decay of the adapters
MAX_GRAD_NORM = 1.0  # clip gradients to this norm; 0: do not clip
MAX_SKIPPED = 10  # stop after this many steps in a row whose loss or gradient is not finite (at the end of the run: 3)

# More: validation and generation
VALIDATE_EVERY = 0  # steps between validations; 0: a tenth of the run, at least 10; the last step is always validated
BEST_BY = "auto"  # score that selects best.safetensors: "loss", "exact_match", "cider" …; "auto": the task's
PATIENCE = 0  # stop after this many validations without a better BEST_BY; 0: never
MIN_IMPROVEMENT = 0.0001  # smallest gain in BEST_BY that counts as better for PATIENCE
MAX_NEW_TOKENS = 0  # largest number of generated tokens, stored in the adapter; 0: the longest text plus a margin
NUM_BEAMS = 1  # beams of beam search, for validation and stored in the adapter; 1: greedy search
GENERATION = {}  # more options, stored in the adapter: {"repetition_penalty": 1.2}; see docs/generation.md

# More: speed and memory
FAST = True  # faster attention, faster adapter updates and packed texts; False: the plain computation, for comparison
COMPILE = False  # torch.compile the training step (retrieval: the ViT): a slower start, and faster steps of small models
CACHE_GB = 10.0  # GB of disk for images and ViT states that repeat between epochs, in OUTPUT_DIR/.cache; 0: no cache
BASE_DTYPE = "auto"  # frozen weights: "fp32", "bf16", "fp16", "int8" or "nf4"; "auto": 16 bits if the precision is fp16 or bf16
CHECKPOINTING = False  # recompute activations in the backward pass, which needs less memory and is a third slower
SHARD = False  # shard the frozen weights over torchrun's processes (FSDP2), for a model too large for one GPU

# More: checkpoints and logs
CHECKPOINT_SECONDS = 60.0  # seconds between checkpoints; 0: after every micro-batch
KEEP_CHECKPOINTS = 2  # number of newest checkpoints to keep
ALLOW_CHANGED = False  # resume even if settings, data or base have changed; the result then differs
INIT_ADAPTER = ""  # continue from the weights of an adapter, with a new schedule: a run folder, a file or "latest"
LOG_EVERY = 10  # optimizer steps between lines of metrics.jsonl
TENSORBOARD = False  # also write TensorBoard event files: pip install "lora_blip[tensorboard]"

if __name__ == "__main__":
    from lora_blip.cli import run_train

    run_train(globals(), __doc__)
