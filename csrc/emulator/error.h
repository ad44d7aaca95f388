// A kernel did what hardware would not forgive, and where.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace longrope::emulator {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A line of a kernel's source.
struct Site {
    const char* file;
    int line;

    // As a default argument: the line of the call.
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }

    std::string text() const {
        const std::string path = file ? file : "?";
        return path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(line);
    }

    bool operator==(const Site& other) const { return file == other.file && line == other.line; }
};

}  // namespace longrope::emulator
