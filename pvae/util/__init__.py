"""General helpers that do not depend on models: files, TOML, seeds, memory, progress bars, provenance."""

from pvae.util.files import digest, follows, plain, write_atomic
from pvae.util.progress import Progress, ProgressBar, StageProgress, silent
