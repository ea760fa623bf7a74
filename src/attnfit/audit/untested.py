"""Forms of access that some models have no attack on here: a report says so, and never gives them a share."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attnfit.audit.access import Access, Search
from attnfit.audit.errors import AuditError
from attnfit.audit.models.model import Model

if TYPE_CHECKING:
    from attnfit.audit.observation import Observation


class Untested(Access):
    """One row for a whole text. What others have recovered from it stands in the message.

    Attributes
    ----------
    published : str
        The best figure published, and whose it is.
    """

    forecasts, ordered = False, False
    published: ClassVar[str] = ""

    def search(self, model: Model, observation: Observation, budget: int) -> Search:
        """Refuse: there is no attack here.

        Raises
        ------
        AuditError
            Always.
        """
        raise AuditError(
            f"there is no attack here on {self.description}, which others have read: {self.published}"
        )
