"""What can go wrong, each with an exit status of its own, so that a test can tell it from its job's."""

PANICKED = 121
HUNG = 122
NO_STATUS = 123
TIME_LIMIT = 124
UNABLE = 125


class Failed(Exception):
    """The machine did not run the job to its end; the message says why."""

    def __init__(self, message: str, status: int = UNABLE):
        super().__init__(message)
        self.status = status
