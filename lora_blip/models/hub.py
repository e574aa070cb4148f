"""Find the files of a checkpoint: a folder, a folder of this package, or a repository of the Hugging Face hub.

A repository is downloaded once as files, and everything else reads its folder in the cache. If the hub cannot be reached, the
cached files are used. Only configuration, tokenizer and weight files are downloaded, never code.
"""

from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from lora_blip.errors import MissingBaseError, ModelError
from lora_blip.models.bin_weights import INDEX, WEIGHTS
from lora_blip.models.library import first_line
from lora_blip.models.local_base import near_embedded
from lora_blip.models.weight_names import SAFE_INDEX, SAFE_SHARDS, SAFE_WEIGHTS
from lora_blip.runtime.hub_adapters import TOKEN, bar_of_one_attempt, one_message, refuses_token
from lora_blip.runtime.hub_cache import SECONDS, download_command, remember, root_of, snapshots

FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # configurations and tokenizers; the weights are chosen in `_weights`
ANY_WEIGHTS = (SAFE_WEIGHTS, SAFE_INDEX, WEIGHTS, INDEX)
CONVERTER, CONVERSION = "SFconvertbot", "Adding `safetensors` variant of this model"
EXAMPLE = "give a folder that contains config.json, or a hub name such as Salesforce/blip-image-captioning-large"


def fetch(name: str) -> str:
    """Return the local folder of a hub repository, `user/name` or `user/name@revision`. Download what is not in the cache.

    A revision is a branch, a tag or a commit; the default is main. Raise MissingBaseError if there is no such repository, or if
    the hub cannot be reached and the cache lacks the checkpoint. The message names an embedded base with a similar name.
    """
    try:
        return _fetch(name)
    except ModelError as error:
        raise MissingBaseError(f"{near_embedded(name)}{error}") from None


def no_folder(name: str) -> str:
    return f"there is no folder {name!r} in {str(Path.cwd())!r}"


def _fetch(name: str) -> str:
    repository, _, revision = name.partition("@")
    try:
        if constants.HF_HUB_OFFLINE:
            return _cached(repository, name, "HF_HUB_OFFLINE is set")
        return _downloaded(repository, revision or "main")
    except HFValidationError:
        raise ModelError(f"{no_folder(name)}, and it is not a hub name; {EXAMPLE}") from None
    except GatedRepoError:
        raise ModelError(
            f"the hub gives {name!r} only to users who accepted its terms; accept them on {constants.ENDPOINT}/{repository}, "
            "then log in: hf auth login"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{repository!r} on the hub has no revision {revision!r}; give {repository!r} for main, "
            f"or a branch, tag or commit that {constants.ENDPOINT}/{repository}/commits lists"
        ) from None
    except RepositoryNotFoundError as error:
        if refuses_token(error):
            raise ModelError(f"model {name!r}: {TOKEN}") from None
        raise ModelError(
            f"{no_folder(name)}, and no model of this name on the hub that you can read; check the spelling (if it "
            f"is private: hf auth login), or {EXAMPLE}"
        ) from None
    except (httpx.HTTPError, HfHubHTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError, OSError) as error:
        if refuses_token(error):
            raise ModelError(f"model {name!r}: {TOKEN}") from None
        return _cached(repository, name, f"the hub cannot be reached ({first_line(error)})")


def _downloaded(repository: str, revision: str) -> str:
    api = HfApi()
    info = api.model_info(repository, revision=revision, timeout=SECONDS)
    commit, files = str(info.sha), {each.rfilename for each in info.siblings or ()}
    weights = _weights(files)
    if weights and weights[0].endswith(".bin") and (converted := _converted_commit(api, repository, commit)):
        commit, weights = converted, [SAFE_WEIGHTS, SAFE_INDEX, SAFE_SHARDS]
    patterns = [*FILES, *weights]
    with one_message():
        folder = snapshot_download(
            repository, revision=commit, allow_patterns=patterns, ignore_patterns=["*/*"], endpoint=constants.ENDPOINT,
            tqdm_class=bar_of_one_attempt(),
        )  # fmt: skip
    remember(repository, revision, commit)
    return folder


def _weights(files: set[str]) -> list[str]:
    """Return the patterns of the weights to download: safetensors if there are any."""
    if SAFE_WEIGHTS in files:
        return [SAFE_WEIGHTS]
    if SAFE_INDEX in files:
        return [SAFE_SHARDS]
    if WEIGHTS in files:
        return [WEIGHTS]
    return ["pytorch_model-*.bin"] if INDEX in files else []


def _converted_commit(api: HfApi, repository: str, commit: str) -> str:
    """Return the commit of the hub's own conversion of `commit` to safetensors, or "" if there is none.

    The conversion is an open pull request of the hub's converter, one commit after `commit`. No conversion is requested.
    """
    try:
        for request in api.get_repo_discussions(repository):
            if request.is_pull_request and request.status == "open" and request.title == CONVERSION:
                commits = api.list_repo_commits(repository, revision=request.git_reference)
                if request.author == CONVERTER and len(commits) > 1 and commits[1].commit_id == commit:
                    return str(commits[0].commit_id)
    except (httpx.HTTPError, HfHubHTTPError):
        return ""  # discussions may be disabled: the .bin is read
    return ""


def _cached(repository: str, name: str, reason: str) -> str:
    """Return the newest complete copy in the cache, and print one line. Raise ModelError if there is none."""
    root, revision = root_of(repository), name.partition("@")[2]
    if folder := cached(name):
        if not constants.HF_HUB_OFFLINE:
            print(f"{reason}; using the copy of {name!r} in the cache, {folder}", flush=True)
        return folder
    raise ModelError(
        f"{reason}, {no_folder(name)}, and the cache has no complete copy of this model ({root}). "
        f"Download it on a machine with a network: {download_command(repository, revision, 'base')}. Then copy the folder "
        'here, and give its path: MODEL = "base" (--model base; in Python: base="base", or model="base" in a config)'
    ) from None


def cached(name: str) -> str:
    """Return the folder of the newest complete copy of `user/name` or `user/name@revision` in the cache, or ""."""
    repository, _, revision = name.partition("@")
    for folder in snapshots(root_of(repository), revision):
        if (folder / "config.json").exists() and any((folder / each).exists() for each in ANY_WEIGHTS):
            return str(folder)
    return ""
