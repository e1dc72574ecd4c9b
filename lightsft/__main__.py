"""`python -m lightsft` is the `lightsft` command."""

from lightsft.cli.app import main

if __name__ == "__main__":
    main()
