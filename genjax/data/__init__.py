"""Data: images by name, 2-D densities, batches as a function of (seed, step), scaling."""

from genjax.data.loading import DataSpec as DataSpec
from genjax.data.loading import load as load
from genjax.data.pipeline import Records as Records
from genjax.data.pipeline import batch_at as batch_at
from genjax.data.pipeline import check_arrays as check_arrays
from genjax.data.pipeline import in_order as in_order
from genjax.data.pipeline import num_examples as num_examples
from genjax.data.pipeline import stream as stream
from genjax.data.preparing import NotPreparedError as NotPreparedError
from genjax.data.scaling import Scaling as Scaling
from genjax.data.synthetic import DENSITIES as DENSITIES
from genjax.data.synthetic import Checkerboard as Checkerboard
from genjax.data.synthetic import Density as Density
from genjax.data.synthetic import GaussianMixture as GaussianMixture
from genjax.data.synthetic import Pinwheel as Pinwheel
from genjax.data.text import Text as Text
from genjax.data.text import Tokeniser as Tokeniser
from genjax.data.text import pack as pack
from genjax.data.text import scored_windows as scored_windows
from genjax.data.text import text as text
from genjax.data.text import tokeniser as tokeniser
from genjax.data.text import windows as windows
from genjax.data.varying import crop_and_flip as crop_and_flip
