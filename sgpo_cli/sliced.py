"""Sequences that make an item when it is asked for."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar, overload

T = TypeVar("T")


class Sliced(Sequence[T], ABC, Generic[T]):
    """A sequence by its length and the item at a position from 0 on; places from the end and slices follow."""

    @abstractmethod
    def item(self, position: int) -> T:
        """The item at `position`, which is within the length."""

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        wanted = range(len(self))[place]
        return self.item(wanted) if isinstance(wanted, int) else [self.item(each) for each in wanted]
