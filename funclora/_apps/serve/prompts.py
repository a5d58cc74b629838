"""From a request to token ids."""

from __future__ import annotations

from typing import Any

from funclora._apps.serve.options import CHOICES
from funclora._apps.serve.problems import Problem, malformed
from funclora._apps.train.chat import opened
from funclora._apps.train.messages import REASONING, ROLES
from funclora._apps.train.records import Record
from funclora._apps.train.tokenizer import begun
from funclora.errors import FuncloraError

MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id", "refusal", *REASONING)
NO_TEMPLATE = (
    "The model's tokenizer has no chat template. Use /v1/completions, or start the server with --chat-template FILE."
)


class Prompts:
    """Makes token ids of texts and chats.

    Args:
        tokenizer: as from `load_tokenizer`.
        vocabulary: number of rows of the model's embedding.
        limit: maximum context in tokens; None if there is no limit.

    Examples:
        >>> from funclora._apps.train.tokenizer import ByteTokenizer
        >>> Prompts(ByteTokenizer(), 256, 8).texts(["ab", "c"])
        [[97, 98], [99]]
    """

    def __init__(self, tokenizer: Any, vocabulary: int, limit: int | None) -> None:
        self.tokenizer, self._vocabulary, self.limit = tokenizer, vocabulary, limit

    def texts(self, prompt: Any) -> list[list[int]]:
        """The field `prompt`: a text, ids, or a list of either.

        Raises:
            Problem: it is something else, empty, or has ids that the model does not have.
        """
        several = prompt if isinstance(prompt, list) and not _are_ids(prompt) else [prompt]
        if not several or len(several) > CHOICES:
            raise malformed("prompt", f"1 to {CHOICES} prompts", prompt)
        return [self._checked(self._ids(each), "prompt") for each in several]

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return begun(self.tokenizer, prompt)
        if isinstance(prompt, list) and prompt and _are_ids(prompt):
            return list(prompt)
        raise malformed("prompt", "a text, a list of token ids, or a list of one of these", prompt)

    def chat(self, messages: Any) -> list[int]:
        """The field `messages`, in the tokenizer's chat template.

        Raises:
            Problem: there is no template, it refuses the messages, or they are none.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise Problem(400, NO_TEMPLATE, param="messages", code="no_chat_template")
        if not isinstance(messages, list) or not messages:
            raise malformed("messages", "a list of messages", messages)
        said = [_message(i, message) for i, message in enumerate(messages)]
        record = Record({"messages": said}, "the request", "the request")
        try:
            ids = opened(record, self.tokenizer)
        except FuncloraError as error:
            raise Problem(400, str(error), param="messages") from error
        return self._checked(ids, "messages")

    def inputs(self, value: Any) -> list[list[int]]:
        """The field `input` of /v1/embeddings, with the special tokens that an encoder expects.

        Raises:
            Problem: as for `texts`; also if one is too long.
        """
        several = value if isinstance(value, list) and not _are_ids(value) else [value]
        if not several or len(several) > CHOICES:
            raise malformed("input", f"1 to {CHOICES} texts", value)
        found = []
        for each in several:
            if isinstance(each, str):
                ids: list[int] = self.tokenizer(each)["input_ids"]
            elif isinstance(each, list) and each and _are_ids(each):
                ids = list(each)
            else:
                raise malformed("input", "a text, a list of token ids, or a list of one of these", each)
            if self.limit is not None and len(ids) > self.limit:
                raise Problem(
                    400,
                    f"input: a text has {len(ids)} tokens, and the model's context {self.limit}. Shorten it.",
                    param="input",
                    code="context_length_exceeded",
                )
            found.append(self._checked(ids, "input"))
        return found

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise Problem(400, f"{param}: it has no tokens. Give at least one word.", param=param)
        if not 0 <= min(ids) <= max(ids) < self._vocabulary:
            raise malformed(param, f"token ids from 0 to {self._vocabulary - 1}", [min(ids), max(ids)])
        return ids

    def room(self, ids: list[int], wanted: int | None, longest: int, default: int | None) -> int:
        """How many tokens the answer to a prompt may have.

        Args:
            ids: the prompt.
            wanted: as the request says; None if it does not.
            longest: the most that the server allows.
            default: what there is without a wish; None for as many as there may be.

        Raises:
            Problem: the model's context is too short.
        """
        left = longest if self.limit is None else self.limit - len(ids)
        if left < (wanted or 1):
            asked = f", and max_tokens is {wanted}" if wanted else ""
            raise Problem(
                400,
                f"The prompt has {len(ids)} tokens{asked}; the model's context has {self.limit}, including the answer. "
                "Shorten the prompt, or ask for fewer tokens.",
                param="max_tokens" if wanted else None,
                code="context_length_exceeded",
            )
        return wanted or min(left, longest, default or longest)


def _are_ids(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(each, int) and not isinstance(each, bool) for each in value)


def _message(i: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise malformed(f"messages[{i}]", "an object", message)
    said = {name: value for name, value in message.items() if value is not None or name == "content"}
    if odd := [name for name in said if name not in MESSAGE]:
        raise malformed(f"messages[{i}]", f"the fields {', '.join(MESSAGE)}", odd[0])
    if said.get("role") not in ROLES:
        raise malformed(f"messages[{i}]", f"as role one of {', '.join(ROLES)}", said.get("role"))
    return said
