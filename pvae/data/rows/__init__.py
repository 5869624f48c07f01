"""Rows of a data source before they become tensors: arrays in memory or on the disk, table columns, transforms."""

from pvae.data.rows.cache import cache_folder
from pvae.data.rows.columns import Column, ContinuousColumn
from pvae.data.rows.files import AnyArray, ArrayLayout, Index, SparseRows, Stored, candidate, user_folder
from pvae.data.rows.prepare import Floats, worded
from pvae.data.rows.rows import NEW, PARTLY_LABELLED, SPLITS, Part, Rows, in_order, joined, partition, reshape
