"""The `plait` command, also as `python -m plait`: Ctrl-C ends it quietly while it is still being imported."""

import os


def main() -> None:
    try:
        import signal

        quiet = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if quiet:
            # An exception that strikes an import may come out of it as another one.
            signal.signal(signal.SIGINT, _stop)
        from plait.cli import main as command

        if quiet:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    except KeyboardInterrupt:
        _stop()
    else:
        command(prog_name="plait")


def _stop(*_: object) -> None:
    os.write(2, b"plait: stopped\n")
    os._exit(130)


if __name__ == "__main__":
    main()
