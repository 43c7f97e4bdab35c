from ard.cli import main

main()
