"""Pairs on the Hub: download and upload, and one sentence for what goes wrong on the way."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, whichever this version uses
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


class Repository:
    """A repository to upload a pair or an adapter to; made if missing.

    Args:
        repo_id: its id on the Hub.
        token: Hub token.
        private: whether it must be private.
        why: what is said to one who would publish it.

    Raises:
        OSError: if the Hub cannot be reached, or refuses.
        ValueError: it is public, and `private` is set.
    """

    def __init__(
        self,
        repo_id: str,
        token: str | bool | None,
        private: bool,
        why: str = "the adversarial prompt is a jailbreak for its model",
    ) -> None:
        self.api = HfApi(token=token)
        with _hub_errors(repo_id, None):
            self.repo_id = self.api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            visibly_private = self.api.model_info(self.repo_id).private
        if private and not visibly_private:
            raise ValueError(
                f"{self.repo_id} is public, and {why}: choose a private repository, or publish with private=False "
                "(acd-logits push --public)."
            )

    def upload(self, folder: Path, commit_message: str, revision: str | None, create_pr: bool) -> CommitInfo:
        """Upload all files of a folder in one commit."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        with _hub_errors(self.repo_id, revision):
            if revision and not create_pr and not revision.startswith("refs/"):
                self.api.create_branch(self.repo_id, branch=revision, exist_ok=True)
            # Not upload_folder, which may spread the files over several commits
            return self.api.create_commit(
                self.repo_id,
                [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )


def download(repo_id: str, **kwargs: Any) -> Path:
    """`snapshot_download`, into the cache; raise OSError with one sentence where it fails."""
    with _hub_errors(repo_id, kwargs["revision"]):
        try:
            return Path(snapshot_download(repo_id, **kwargs))
        except LocalEntryNotFoundError as error:
            if isinstance(error.__cause__, HfHubHTTPError):
                raise error.__cause__ from None
            raise OSError(
                f"{repo_id} is not a folder, not in the local cache, and the Hub was not asked or could not be "
                "reached: check the name and the connection (HF_HUB_OFFLINE and local_files_only keep it offline)."
            ) from None


@contextlib.contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Say in one sentence what went wrong on the way to or from the Hub."""
    try:
        yield
    except RevisionNotFoundError:
        raise OSError(f"{repo_id} has no revision {revision!r} on the Hub.") from None
    except RepositoryNotFoundError:
        raise OSError(
            f"{repo_id} is neither a folder nor a repository on the Hub that you can read: check the name, or pass a "
            "token for a private one."
        ) from None
    except HFValidationError:
        raise OSError(f"{repo_id} is neither a folder nor a valid Hub id: check the path.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {401: "your token is missing or not valid", 403: "your token does not allow it"}
        reason = reasons.get(status) or " ".join((error.server_message or error.response.reason_phrase).split())
        raise OSError(f"the Hub refused {repo_id} with status {status}: {reason}.") from None
    except (ConnectionError, HTTPError, RuntimeError) as error:
        # huggingface_hub wraps what stops an upload in a RuntimeError. Only the names of these errors are shown:
        # some messages quote the request's headers, and the token with them
        name = type(error.__cause__ or error).__name__
        raise OSError(f"the connection to the Hub failed at {repo_id} ({name}): try again.") from None
