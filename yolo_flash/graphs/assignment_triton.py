"""A Triton kernel that solves assignment problems, each in one program: shortest augmenting paths (Crouse 2016).

This is the algorithm of SciPy's `linear_sum_assignment`, in float64 as there. Boxes are the rows, and are taken in one
after the other. Queries are the columns, of which a program holds all that it knows in registers: who has a query, its
price, and in the search for a box's query the distance to it and the box before it on the path.
"""

import triton
import triton.language as tl


@triton.jit
def assign(costs, counts, found, images, boxes, queries, WIDTH: tl.constexpr):
    """The box of each query.

    Args:
        costs: `[layers, images, boxes, queries]`, finite.
        counts: Boxes of each image, at most as many as queries.
        found: `[layers, images, queries]`, -1 for a query without a box.
        images: Their number; those of `boxes` and `queries` likewise.
        boxes: Room for boxes in an image.
        queries: Of an image.
        WIDTH: Power of two that holds the queries.
    """
    problem = tl.program_id(0)
    count = tl.load(counts + problem % images)
    costs += problem.to(tl.int64) * boxes * queries
    column = tl.arange(0, WIDTH)
    exists = column < queries
    zero = tl.full([], 0.0, tl.float64)
    far = tl.full([WIDTH], float("inf"), tl.float64)
    owner = tl.full([WIDTH], -1, tl.int32)
    price = tl.zeros([WIDTH], tl.float64)
    for box in range(count):
        # Search the nearest query that is free.
        row, worth, base = box, zero, zero
        distance, before, open_ = far, tl.zeros([WIDTH], tl.int32), exists
        end = box * 0
        steps = box * 0
        while (row >= 0) & (steps <= box):  # each step closes a query of another box, and the last one a free query
            cost = tl.load(costs + row * queries + column, mask=exists, other=0.0).to(tl.float64)
            through = base + cost - worth - price
            nearer = open_ & (through < distance)
            distance = tl.where(nearer, through, distance)
            before = tl.where(nearer, row, before)
            base, end = tl.min(tl.where(open_, distance, far), 0, return_indices=True)
            here = column == end
            open_ = open_ & (column != end)
            row = tl.sum(tl.where(here, owner, 0), 0)
            own = tl.load(costs + row * queries + end, mask=row >= 0, other=0.0).to(tl.float64)
            worth = own - tl.sum(tl.where(here, price, 0.0), 0)
            steps += 1
        price = tl.where(exists & (open_ == 0), price - (base - distance), price)
        # Hand each query on the path to the box before it, which gives up its own.
        taker = box * 0 - 1
        steps = box * 0
        while (taker != box) & (steps <= box):
            here = column == end
            taker = tl.sum(tl.where(here, before, 0), 0)
            given_up = tl.sum(tl.where(owner == taker, column, 0), 0)
            owner = tl.where(here, taker, owner)
            end = given_up
            steps += 1
    tl.store(found + problem.to(tl.int64) * queries + column, owner.to(tl.int64), mask=exists)
