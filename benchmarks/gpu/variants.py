KINDS = ()


def load(p):
    return None


class Calls:
    def __init__(self, *a):
        pass
