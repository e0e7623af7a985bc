"""Data sources, one file or folder each."""

from chiasm.data.sources import chat_formats as chat_formats
from chiasm.data.sources import hf_dataset as hf_dataset
from chiasm.data.sources import labelled as labelled
from chiasm.data.sources import llava_json as llava_json
from chiasm.data.sources import messages as messages
from chiasm.data.sources import nlvr as nlvr
from chiasm.data.sources import parquet as parquet
from chiasm.data.sources import photos as photos
from chiasm.data.sources import playground as playground
from chiasm.data.sources import shots as shots
from chiasm.data.sources import tones as tones
from chiasm.data.sources import webdataset as webdataset
