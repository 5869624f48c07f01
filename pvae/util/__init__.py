"""General helpers that do not depend on models: value types, files, TOML, seeds, memory, progress bars, provenance."""

from pvae.util.files import digest, follows, plain, pretty, read_inside, read_object, write_atomic, write_together
from pvae.util.progress import Progress, ProgressBar, StageProgress, silent
from pvae.util.records import Record, field, replace
