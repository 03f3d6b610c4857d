"""`python -m exl3 COMMAND ...`"""

from exl3.commands import main

main()
