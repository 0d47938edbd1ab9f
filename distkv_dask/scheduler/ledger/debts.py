"""The debt graph (paper v1): which worker holds how many blocks for the sequences of another one."""

from __future__ import annotations

from collections import Counter


class Debts(dict[str, Counter[str]]):
    """Blocks owed by debtor (a sequence's home) and creditor (a holder of its blocks).

    Examples
    --------
    >>> debts = Debts()
    >>> debts.owe("a", "b", 3)
    >>> debts.owe("a", "c", 1)
    >>> debts.by_pair(), debts.by_creditor()
    (Counter({('a', 'b'): 3, ('a', 'c'): 1}), Counter({'b': 3, 'c': 1}))
    >>> debts.owe("a", "b", -3)
    >>> debts["a"]
    Counter({'c': 1})
    """

    def owe(self, debtor: str, creditor: str, blocks: int) -> None:
        """One worker owes another one this many blocks more (or less)."""
        owed = self.setdefault(debtor, Counter())
        owed[creditor] += blocks
        if not owed[creditor]:
            del owed[creditor]
            if not owed:
                del self[debtor]

    def by_pair(self) -> Counter[tuple[str, str]]:
        """Blocks owed, by debtor and creditor."""
        return Counter({(debtor, creditor): n for debtor, owed in self.items() for creditor, n in owed.items()})

    def by_creditor(self) -> Counter[str]:
        """Blocks that each creditor holds for others."""
        return sum(self.values(), Counter())
