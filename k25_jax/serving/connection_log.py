"""The log of connections: what came that is no HTTP gets one line, and only our own mistakes a traceback."""

import logging

from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import HttpProcessingError

FROM_OUTSIDE = (HttpProcessingError, ClientPayloadError, web.RequestPayloadError, ConnectionError)
LONGEST = 200  # characters of what a client sent


class ConnectionLog(logging.LoggerAdapter):
    """Stands where aiohttp wants a logger."""

    def exception(self, msg, *args, exc_info=True, **how):
        """An error with its traceback, or the line for what a client did."""
        if not self._from_outside(exc_info):
            super().exception(msg, *args, exc_info=exc_info, **how)

    def debug(self, msg, *args, exc_info=None, **how):
        """As `exception`: aiohttp takes the first words of other protocols for nothing worth telling."""
        if not self._from_outside(exc_info):
            super().debug(msg, *args, exc_info=exc_info, **how)

    def _from_outside(self, problem) -> bool:
        if not isinstance(problem, FROM_OUTSIDE):
            return False
        words = getattr(problem, "message", "") or str(problem)
        self.warning("what came is no HTTP: %s", ascii(" ".join(words.split()))[1:-1][:LONGEST])
        return True
