"""Writers of artefacts: the TVM plan and library, the TFLite flatbuffers."""
