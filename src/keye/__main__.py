"""Where `keye` begins: `python -m keye`, too."""

from keye.config.terminal import end_at_ctrl_c


def main() -> None:
    end_at_ctrl_c()
    from keye.producer.cli import app

    app(prog_name="keye")


if __name__ == "__main__":
    main()
