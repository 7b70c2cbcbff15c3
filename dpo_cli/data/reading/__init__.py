"""From a file to records, by content and never by its name, as a stream of bounded memory.

:func:`~dpo_cli.data.reading.files.read_blocks` is the door; each kind of file has a module.
"""
