"""Train a LoRA adapter: edit the settings, then `python train.py`. Each is also a flag: --batch-size 8."""

MODEL = "assets/tiny-blip"  # hub name or folder: "Salesforce/blip-image-captioning-large", "Salesforce/blip2-opt-2.7b"
TASK = "auto"  # "caption", "vqa" or "retrieval"; auto: what the checkpoint was made for
ANNOTATIONS = "annotations.jsonl"  # a line each: {"image": "red_1.jpg", "text": "a red cube"}, or "question" and "answers"
IMAGE_ROOT = ""  # folder that image paths are relative to; empty: the annotations' own
PROMPT = ""  # text before every caption, never in the loss; vqa: a template, "Question: {question} Answer:"
IMAGE_SIZE = 0  # side of the square images in pixels, positions are interpolated; 0: the model's own size
VAL_FRACTION = 0.1  # share of the images held out for validation; 0: none
VAL_ANNOTATIONS = ""  # a file like ANNOTATIONS with the images to validate on; empty: VAL_FRACTION of them
OUTPUT_DIR = "lora_blip_output"  # each run gets a folder of its own in here

TARGETS = "vit"  # where adapters go: "vit", "vit,qformer", "text", "lm", "vit.q,vit.v", "vit[8:12]", "text:r=4", a regex
R = 8  # rank of the update
ALPHA = 32.0  # the update is scaled by alpha / r
DROPOUT = 0.0  # dropout on the adapters' input

EPOCHS = 30  # passes over the training images
MAX_STEPS = 0  # stop after so many optimizer steps; 0: after the epochs
BATCH_SIZE = 8  # images in a micro-batch
ACCUMULATION = 1  # micro-batches in an optimizer step
LR = 0.0  # peak learning rate; 0: 1e-4, and for a tiny base 3e-3 (BLIP) or 1.5e-3 (BLIP-2)
WARMUP_STEPS = 20  # optimizer steps of linear warm-up, at most a fifth of all, before the cosine decay
WEIGHT_DECAY = 0.01  # AdamW's decoupled weight decay, on the adapters
MAX_GRAD_NORM = 1.0  # gradients are clipped to this norm; 0: never
PRECISION = "auto"  # "fp16", "bf16" or "fp32"; auto: what the device does best
BASE_DTYPE = "auto"  # dtype of the frozen weights; auto: in 16 bits what is read in 16 bits
CHECKPOINTING = False  # recompute activations in the backward pass: less memory, a third slower
AUGMENT = True  # gentle random mirror, shift, scale and brightness; no mirror if a text says left or right
VIEWS = 0  # versions of each augmented picture, which come in turn and can be kept; 0: always another
CACHE_GB = 10.0  # disk in OUTPUT_DIR/.cache for pictures and what comes before the first adapter, where it repeats; 0: none
FAST = True  # the same sums by faster ways: attention, update, texts; False: the plain ways, to compare with
COMPILE = False  # torch.compile the ViT's blocks: some seconds at the start, faster steps on some machines

VALIDATE_EVERY = 0  # steps between validations; 0: a tenth of the run, or 10; the end is always validated
BEST_BY = "auto"  # score that picks best.safetensors: "loss", "exact_match", "cider", "vqa_accuracy" …; auto: the task's own
PATIENCE = 0  # stop after so many validations without a better BEST_BY score; 0: never
MIN_IMPROVEMENT = 1e-4  # smallest gain in BEST_BY that counts as better for PATIENCE
TENSORBOARD = False  # write TensorBoard's event files too: pip install 'lora_blip[tensorboard]'
MAX_NEW_TOKENS = 0  # most tokens of a generated text, kept in the adapter; 0: the longest text and a margin
NUM_BEAMS = 1  # beams of generation, here and by default with the adapter
MAX_SKIPPED = 10  # stop after so many steps in a row with a loss or gradient that is not finite
SHARD = False  # spread the frozen weights over torchrun's processes (FSDP2), for a backbone too large for each of them
RESUME = "auto"  # go on with the newest interrupted run of these settings; a run's folder: with that one; "off": begin anew
ALLOW_CHANGED = False  # go on with a run though settings, data or base have changed, so not exactly
CHECKPOINT_SECONDS = 60.0  # seconds between checkpoints, each to go on from; 0: at every micro-batch
KEEP_CHECKPOINTS = 2  # how many of them stay, the newest
SEED = 0  # decides the split, the order, the augmentation and the adapters' start
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1", "mps"
NUM_WORKERS = -1  # processes that load images; 0: none; -1: none beside a model on the CPU, else 4
LOG_EVERY = 10  # optimizer steps between lines of metrics.jsonl
ON_BAD_DATA = "stop"  # when a line of the annotations is no good: "stop" or "skip"
CHECK_IMAGES = "all"  # "all": each is decoded before the first step; "lazy": when needed, and a broken one stops the run

if __name__ == "__main__":
    from lora_blip.cli import run_train

    run_train(globals(), __doc__)
