"""From a finished run to the places that serve it: an ordinary model folder, GGUF files, an Ollama Modelfile.

Whatever is written is read back by another process and compared with the run before it gets its name.
"""
