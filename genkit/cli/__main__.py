"""``python -m genkit.cli``, for launchers of several processes."""

from genkit.cli import main

if __name__ == "__main__":
    main()
