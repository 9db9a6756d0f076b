#% always-left
def strategy(board):
    return 'A'
#% up-then-left-by-parity
def strategy(board):
    return 'W' if sum(map(sum, board)) % 4 == 0 else 'A'
#% by-the-sum
def strategy(board: list[list[int]]) -> str:
    total = 0
    for row in board:
        for cell in row:
            total += cell
    return "WASD"[total // 2 % 4]
#% by-the-number-of-tiles
def strategy(board):
    tiles = [cell for row in board for cell in row if cell]
    return "ASDW"[len(tiles) % 4]
#% by-the-largest-tile
def strategy(board):
    best = max(max(row) for row in board)
    for r, row in enumerate(board):
        if best in row:
            return "WASD"[(r + row.index(best)) % 4]
#% by-the-corner
def strategy(board):
    if board[0][0] == 0:
        return "A"
    if board[0][-1] == 0:
        return "W"
    return "D" if board[-1][0] > board[-1][-1] else "S"
#% one-line-lambda
strategy = lambda board: "WA"[board[0][0] > board[3][3]]
#% semicolons-on-one-line
def strategy(board): a = board[0]; b = board[-1]; return "A" if sum(a) >= sum(b) else "S"
#% conditional-chain
def strategy(b):
    return "W" if b[0][0] else "A" if b[0][1] else "S" if b[0][2] else "D"
#% first-legal
def strategy(board):
    def slide(row):
        tiles = [t for t in row if t]
        out = []
        i = 0
        while i < len(tiles):
            if i + 1 < len(tiles) and tiles[i] == tiles[i + 1]:
                out.append(tiles[i] * 2)
                i += 2
            else:
                out.append(tiles[i])
                i += 1
        return out + [0] * (len(row) - len(out))

    columns = [list(c) for c in zip(*board)]
    if any(slide(row) != row for row in board):
        return "A"
    if any(slide(column) != column for column in columns):
        return "W"
    if any(slide(row[::-1])[::-1] != row for row in board):
        return "D"
    return "S"
#% greedy-by-merges
def strategy(board):
    n = len(board)
    rows = sum(board[r][c] == board[r][c + 1] != 0 for r in range(n) for c in range(n - 1))
    columns = sum(board[r][c] == board[r + 1][c] != 0 for r in range(n - 1) for c in range(n))
    if rows > columns:
        return "A"
    if columns > rows:
        return "W"
    return "D" if board[0][0] else "S"
#% corner-heuristic
WEIGHTS = [[15, 14, 13, 12], [8, 9, 10, 11], [7, 6, 5, 4], [0, 1, 2, 3]]

def strategy(board):
    score = sum(w * t for ws, ts in zip(WEIGHTS, board) for w, t in zip(ws, ts))
    return "WAAWASWAWD"[score % 10]
#% for-else
def strategy(board):
    for row in board:
        if 0 in row:
            break
    else:
        return "S"
    return "A" if row[0] == 0 else "W"
#% while-else
def strategy(board):
    i = 0
    while i < 4:
        if board[i][i] == 0:
            break
        i += 1
    else:
        return "D"
    return "WASD"[i]
#% nested-comprehension
def strategy(board):
    pairs = {(r, c): v for r, row in enumerate(board) for c, v in enumerate(row) if v}
    r, c = min(pairs, key=lambda p: (-pairs[p], p))
    return "WA" [r > c]
#% set-comprehension
def strategy(board):
    kinds = {cell for row in board for cell in row}
    return "WASD"[len(kinds) % 4]
#% slices-and-steps
def strategy(board):
    odd = [row[::2] for row in board[1::2]]
    even = [row[1::2] for row in board[::2]]
    return "A" if sum(map(sum, odd)) > sum(map(sum, even)) else "W"
#% returns-from-a-dict
MOVES = {"up": "W", "left": "A", "down": "S", "right": "D"}

def strategy(board):
    return MOVES["left"] if board[0][0] >= board[1][1] else MOVES["up"]
#% bit-tricks
def strategy(board):
    x = 0
    for row in board:
        for cell in row:
            x ^= cell
            x = (x << 1 | x >> 15) & 0xFFFF
    return "WASD"[x & 3]
#% string-building
def strategy(board):
    text = "".join(str(cell) for row in board for cell in row)
    return "WASD"[len(text) % 4]
#% chained-comparison
def strategy(board):
    a, b, c, d = board[0]
    return "A" if a >= b >= c >= d else "D" if a <= b <= c <= d else "W"
#% early-returns-and-pass
def strategy(board):
    if not board:
        pass
    if board[0][0] == board[0][1]:
        return "A"
    if board[0][0] == board[1][0]:
        return "W"
    ...
    return "S" if board[2][2] else "D"
#% multiplication-table
def strategy(board):
    table = [[r * c for c in range(4)] for r in range(4)]
    return "AWDS"[sum(table[r][c] * board[r][c] for r in range(4) for c in range(4)) // 2 % 4]
#% integer-logs
def strategy(board):
    return "WASD"[sum(cell.bit_length() for row in board for cell in row) % 4]
