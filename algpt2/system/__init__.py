"""The machine: console, files, memory, processes, devices. It knows no text, model or run."""
