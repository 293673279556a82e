# SPDX-License-Identifier: Apache-2.0
"""Sessions: timelines of a model, each with its tokens and KV state.  Source: DESIGN 3, 7."""

import os
from types import TracebackType
from typing import TYPE_CHECKING, Literal, overload

import numpy as np

from dsv4 import _core
from dsv4.arrays import WANT, Float32, Int32, Logits, Prompt, check_logits, check_room
from dsv4.memory import size

if TYPE_CHECKING:
    from dsv4.edit import Edit
    from dsv4.model import Model
    from dsv4.trace import Trace

NOW = -1  # DSV4_NOW: the state a session is in when it is forked
# earlier states a session keeps: by default enough for the last two turns of a conversation
CHECKPOINTS, MOST_CHECKPOINTS = 4, 1024


class Session:
    """One timeline: the tokens so far and the state that belongs to them.  Made by
    `Model.session`.

    Safe to use from several threads: the steps of one session are done one after the other.

    Attributes
    ----------
    model : Model
    """

    def __init__(
        self, model: "Model", core: _core.Session, edit: "Edit | None" = None,
        file: str | None = None,
    ) -> None:
        self.model = model
        self._core = core
        self._edit = edit  # as the core session has it; None: empty
        self._file = file  # that it was last saved to or loaded from

    @property
    def position(self) -> int:
        """Tokens so far."""
        return self._core.position

    @property
    def tokens(self) -> Int32:
        """The tokens so far: int32 [position], a copy."""
        return self._core.tokens(0, self._core.position)

    @property
    def edit(self) -> "Edit":
        """What it changes in its passes; empty unless one was given (`Model.session`, `fork`)."""
        from dsv4.edit import Edit

        return Edit() if self._edit is None else self._edit

    @property
    def nbytes(self) -> int:
        """Bytes of its state now; it grows with the position."""
        return sum(self._core.bytes)

    @overload
    def append(
        self, prompt: Prompt, logits: Literal["last", "all"] = "last", *, special: bool = False,
        trace: "Trace | None" = None,
    ) -> Float32: ...
    @overload
    def append(
        self, prompt: Prompt, logits: Literal["none"], *, special: bool = False,
        trace: "Trace | None" = None,
    ) -> None: ...
    def append(
        self, prompt: Prompt, logits: Logits = "last", *, special: bool = False,
        trace: "Trace | None" = None,
    ) -> Float32 | None:
        """Append tokens and compute what follows them.

        Parameters
        ----------
        prompt : str or sequence of int
            Text is tokenised, with begin-of-sentence put first at position 0; ids are used as
            they are.
        logits : "last", "all" or "none"
            Rows to return.
        special : bool
            Markers in the text become their ids; else they are text like any other.
        trace : Trace, optional
            Copies internals while these tokens are computed.

        Returns
        -------
        float32 [1, vocab] ("last"), [n, vocab] ("all") or None ("none")
            Row i is what follows token i of those appended.

        Raises
        ------
        ValueError, TypeError
            Ids out of range, nothing to append, more tokens than the context holds.
        NonFiniteLogitsError
            The weights gave NaN or infinite logits.

        Notes
        -----
        A call that fails, or is interrupted by Ctrl-C, leaves the session as it was.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     session = model.session()
        ...     session.append([0, 7, 8], logits="all").shape[0], session.tokens.tolist()
        (3, [0, 7, 8])
        """
        want = check_logits(logits)
        position = self.position
        ids = self.model.ids(prompt, bos=position == 0, special=special)
        check_room(position, len(ids), self.model.config.max_position_embeddings, "prompt")
        if trace is not None:
            from dsv4.trace import checked

            return checked(trace, self.model).append(self, ids, want)
        ((rows, _),) = self.model._core.step([(self._core, ids, want, None)], None)
        return rows

    def fork(self, *, edit: "Edit | None" = None) -> "Session":
        """Make a second session with the same past and a future of its own.

        Nothing is copied until one of the two moves on, and then only what it writes: a fork
        takes microseconds and, at first, no memory, however long the context is.

        Parameters
        ----------
        edit : Edit, optional
            What the fork changes beside the edit of this session, from the present position on:
            of its positions, those before are left out.

        Returns
        -------
        Session
            At the same position; without `edit` it continues with the same bits as this one.

        Raises
        ------
        ValueError
            The edit does not fit the model.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     session = model.session()
        ...     _ = session.append("To be, or not to be")
        ...     other = session.fork()
        ...     (session.append([7]) == other.append([7])).all()
        np.True_
        """
        return forked(self, None, edit)

    def rewind(self, position: int) -> None:
        """Go back to an earlier position; what follows is as if the later tokens had never been.

        Parameters
        ----------
        position : int
            0 to the present position.

        Notes
        -----
        Exact: continuing gives the same bits as a session that was never further.  A session
        keeps its state from before and after each of the last appends of several tokens
        (`Model.session` says how many): going back to one of those costs nothing.  Anywhere else
        the tokens from the nearest earlier kept state (or from the beginning) to `position` are
        computed again.  Interrupted or failing, the session stays where it was.

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     session = model.session()
        ...     _ = session.append([0, 5, 6])
        ...     first = session.append([9])
        ...     session.rewind(3)
        ...     session.position, (session.append([9]) == first).all()
        (3, np.True_)
        """
        now = self.position
        if isinstance(position, bool) or not isinstance(position, int | np.integer):
            raise TypeError(f"position: got {type(position).__name__}, wanted an int")
        if not 0 <= position <= now:
            raise ValueError(f"position: got {position}, wanted 0 to {now}, where the session is")
        past = self._core.fork(int(position))
        again = self._core.tokens(past.position, int(position) - past.position)
        if len(again):
            self.model._core.step([(past, again, WANT["none"], None)], None)
        self._core.swap(past)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to a file, for `Model.load_session`.

        Parameters
        ----------
        path : path
            A new file, or one to replace; a symbolic link is followed.

        Raises
        ------
        OSError
            It could not be written; says how many bytes are needed and free.
        FormatError
            There is something else than a file, or this session was loaded from a file that turns
            out to be damaged.
        ValueError
            Its edit holds a callback: a function cannot be saved.

        Notes
        -----
        The file appears whole and synced or not at all: whatever happens meanwhile, the path holds
        the old file or the new one.  It has about as many bytes as `nbytes` and says which model
        it belongs to (a digest of its config, tensors and vocabulary, and samples of its weights).
        The session may go on while it is written.  Its edit is saved, the states kept for `rewind`
        are not.

        Where the file system can clone (btrfs, XFS, bcachefs), rows that are in the file this
        session (or the one it was forked from) was last saved to or loaded from take no further
        room: ten saves of a conversation that grows need about as much as the last one.
        Each file stays whole: the others may be removed.

        Examples
        --------
        See `Model.load_session`.
        """
        from dsv4 import state_file

        with Session(self.model, self._core.fork(NOW)) as frozen:
            self._file = state_file.save(frozen._core, self.model, path, self._edit, self._file)

    def __reduce__(self) -> str:
        raise TypeError("a Session cannot be pickled: it lives in its model; save() writes it to a "
                        "file that Model.load_session reads")

    def _fill(self, position: int, seed: int = 0) -> None:
        """Move on to `position` without computing anything; for measuring long contexts.

        The state becomes pseudo-random numbers of ordinary size, the same for the same seed, as
        many bytes as `position` real tokens would leave; 3.5 KB a token for V4-Flash.  The tokens
        become id 0.  What the model says after that means nothing, how long it takes does.

        Parameters
        ----------
        position : int
            Between the present position and the longest context of the model.
        seed : int

        Examples
        --------
        >>> import dsv4
        >>> with dsv4.load() as model:
        ...     session = model.session()
        ...     session._fill(1000)
        ...     session.append([7]).shape[0], session.position
        (1, 1001)
        """
        self._core.fill(position, seed)

    def close(self) -> None:
        """Free its state now rather than with the object; twice is no error.

        Raises
        ------
        RuntimeError
            Another thread runs a step with it.
        """
        self._core.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        try:
            return f"<dsv4.Session at position {self.position}, {size(self.nbytes)}>"
        except (ValueError, RuntimeError):
            return "<dsv4.Session, closed>"


def edited(
    model: "Model", core: _core.Session, edit: "Edit | None", file: str | None = None
) -> Session:
    """A session of this core, which from now on has this edit; ValueError if it does not fit."""
    from dsv4.edit_base import checked

    native = checked(edit)._native(model)
    core.edit(native)
    return Session(model, core, edit if native is not None else None, file)


def forked(session: Session, checkpoints: int | None, edit: "Edit | None") -> Session:
    """A fork that keeps so many earlier states (None: as many as the session), and changes more
    from its position on."""
    from dsv4.edit_base import checked

    checked(edit).check(session.model.config)
    core = session._core.fork(NOW) if checkpoints is None else session._core.fork(NOW, checkpoints)
    if not edit:
        return Session(session.model, core, session._edit, session._file)
    return edited(session.model, core, session.edit + edit.since(core.position), session._file)


def check_checkpoints(checkpoints: object) -> int:
    """How many earlier states to keep; TypeError or ValueError unless it is 0 to 1024."""
    if isinstance(checkpoints, bool) or not isinstance(checkpoints, int | np.integer):
        raise TypeError(f"checkpoints: got {type(checkpoints).__name__}, wanted an int")
    if not 0 <= checkpoints <= MOST_CHECKPOINTS:
        raise ValueError(f"checkpoints: got {checkpoints}, wanted 0 to {MOST_CHECKPOINTS}")
    return int(checkpoints)
