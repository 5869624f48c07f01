"""General helpers that do not depend on models: files, TOML, seeds, memory, progress bars, provenance."""

from pvae.util.files import digest, follows, plain, write_atomic
from pvae.util.progress import Progress, ProgressBar, StageProgress, silent

__all__ = ["Progress", "ProgressBar", "StageProgress", "digest", "follows", "plain", "silent", "write_atomic"]
