// Which keys a query sees, and which queries see a key.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace longrope {

struct Interval {
    int64_t low, high;  // [low, high), never reversed
};

// Of the query at `index` in a sequence of `length` keys; windows are keys before and after it, -1: unbounded.
LONGROPE_HOST_DEVICE inline Interval visible_interval(int64_t index, int64_t length, int64_t window_left,
                                                      int64_t window_right) {
    const int64_t from = window_left >= 0 ? index - window_left : 0;
    const int64_t low = from > 0 ? from : 0;
    const int64_t to = window_right >= 0 ? index + window_right + 1 : length;
    const int64_t high = to < length ? to : length;
    return {low, high > low ? high : low};
}

// The same the other way round: which of `count` queries, of which the first is at index `start`, see key `key`.
LONGROPE_HOST_DEVICE inline Interval seeing_interval(int64_t key, int64_t start, int64_t count, int64_t window_left,
                                                     int64_t window_right) {
    const int64_t from = window_right >= 0 ? key - window_right - start : 0;
    const int64_t low = from > 0 ? from : 0;
    const int64_t to = window_left >= 0 ? key + window_left + 1 - start : count;
    const int64_t high = to < count ? to : count;
    return {low, high > low ? high : low};
}

}  // namespace longrope
