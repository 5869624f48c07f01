"""General helpers that do not depend on models: value types, files, TOML, seeds, memory, progress bars, provenance."""

from pvae.util.files import digest, follows, plain, write_atomic
from pvae.util.progress import Progress, ProgressBar, StageProgress, silent
from pvae.util.records import Record, field, replace
