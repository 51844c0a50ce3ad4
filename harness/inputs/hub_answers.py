"""What the Hub's refusals and a broken network mean, in one line; for its models and its texts. No torch."""

from __future__ import annotations

import re

COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT_SECONDS = 5.0  # to find out whether the Hub answers at all


def transport(error: BaseException) -> bool:
    """Whether the network is to blame: the client's errors are no OSError, and its module's name has changed."""
    return isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore", "requests"))


def refusal(error: BaseException, what: str) -> str:
    """What the user must do before the Hub gives `what` ('model 'org/name' at revision 'main''); '' for other errors.

    A gated repository tells everybody what it holds: it refuses at the first file.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return f"the Hub {what} is gated: accept its terms on its page and run 'hf auth login'"
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return f"the Hub shows no {what}: check the name, or log in if it is private"
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return f"the Hub takes no token of yours for the {what}: run 'hf auth login', or unset HF_TOKEN"
    return ""


def silence(error: BaseException) -> str:
    """Why the Hub could not be asked: offline by wish, a status, or no answer; '' where the network is not to blame."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answers with status {error.response.status_code}"
    return f"the Hub does not answer ({type(error).__name__})" if transport(error) else ""
