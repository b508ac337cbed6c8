"""The architectures of DeepNets-1M."""

from ghn.deepnets.genotypes import DARTS, GENOTYPES, PDARTS, Genotype, ViT
from ghn.deepnets.network import Network

__all__ = ["DARTS", "GENOTYPES", "PDARTS", "Genotype", "Network", "ViT"]
