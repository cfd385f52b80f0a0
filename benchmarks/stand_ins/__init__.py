"""Stand-ins for codecs, for measurements of everything around a codec. Their results are never a codec's."""
