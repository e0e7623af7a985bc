"""The features of a frozen encoder, kept on disk: each medium is opened and encoded once, whoever asks for it again.

    worker:  medium ──content hash──▶ stored? its layout alone : its pixels
    trainer: batch ──fill──▶ features of every medium, read from the store or encoded now and stored

A feature is found by three hashes: the medium's content, its processing, and the encoder's configuration and weights.
"""

from chiasm.data.features.cache import FeatureCache as FeatureCache
from chiasm.data.features.store import FeatureStore as FeatureStore
