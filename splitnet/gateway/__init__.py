"""The front door of decoder models: OpenAI's HTTP interface (`splitnet gateway`), and what `splitnet chat` shares with it.

Nothing is imported here: the packages that the extra `gateway` brings are for those who use them.
"""
