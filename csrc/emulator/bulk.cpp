// Bulk copies and tiles of tensors (TMA): where the elements of a box lie, and stores that end with their group.
#include <deque>

#include "emulator/mbarrier.h"
#include "emulator/shadow.h"
#include "emulator/swizzle.h"

namespace mmk::emulator {
namespace {

// ---- which bytes a tile consists of

constexpr uint64_t kEncoded = 0x70616D726F736E74;  // marks a map that was encoded
constexpr int kMaxRank = 5;
constexpr uint32_t kMaxBox = 256;

struct Map {
    uint64_t encoded;
    char* base;
    uint32_t element_bytes, rank, swizzle_bits;
    uint32_t box[kMaxRank];
    uint64_t size[kMaxRank], stride[kMaxRank];  // strides in bytes
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

// One row of the box, dense in global memory and, up to the swizzle, in shared memory: 16 bytes at a time where these
// are all inside the tensor, else element by element.
void append_row(std::vector<Piece>& pieces, const Map& map, char* row, bool inside, int64_t first, uint32_t address) {
    const int64_t chunk = 16 / map.element_bytes, size = static_cast<int64_t>(map.size[0]);
    for (int64_t x = 0; x < map.box[0]; x += chunk) {
        char* const shared = static_cast<char*>(shared_pointer(
            swizzled(address + static_cast<uint32_t>(x) * map.element_bytes, static_cast<int>(map.swizzle_bits))));
        const int64_t column = first + x;
        if (inside && column >= 0 && column + chunk <= size) {
            pieces.push_back({shared, row + column * map.element_bytes, 16});
            continue;
        }
        for (int64_t i = 0; i < chunk; i++) {
            const bool exists = inside && column + i >= 0 && column + i < size;
            pieces.push_back({shared + i * map.element_bytes, exists ? row + (column + i) * map.element_bytes : nullptr,
                              map.element_bytes});
        }
    }
}

std::vector<Piece> pieces_of(const Map& map, const int* at, const void* shared) {
    uint32_t rows = 1;
    for (uint32_t i = 1; i < map.rank; i++) rows *= map.box[i];
    std::vector<Piece> pieces;
    for (uint32_t row = 0; row < rows; row++) {
        char* source = map.base;
        bool inside = true;
        uint32_t rest = row;
        for (uint32_t i = 1; i < map.rank; i++) {
            const int64_t x = at[i] + static_cast<int64_t>(rest % map.box[i]);
            rest /= map.box[i];
            inside = inside && x >= 0 && x < static_cast<int64_t>(map.size[i]);
            source += x * static_cast<int64_t>(map.stride[i]);
        }
        append_row(pieces, map, source, inside, at[0], shared_address(shared) + row * map.box[0] * map.element_bytes);
    }
    return pieces;
}

Map decode(const CUtensorMap& encoded, int rank, const void* shared, Site site) {
    Map map;
    memcpy(&map, &encoded, sizeof map);
    if (map.encoded != kEncoded) fail(site, "tensor copy: the map was never encoded");
    if (static_cast<int>(map.rank) != rank) fail(site, "tensor copy: %d coordinates for %u dimensions", rank, map.rank);
    check_aligned(shared, 128, "tensor copy", site);
    return map;
}

int tile_bytes(const Map& map) {
    uint32_t bytes = map.element_bytes;
    for (uint32_t i = 0; i < map.rank; i++) bytes *= map.box[i];
    return static_cast<int>(bytes);
}

// ---- stores: shared memory is read, and global memory written, when the thread waits for it

struct Store {
    std::vector<Piece> pieces;
    Site site;
};
struct Group {
    std::vector<Store> stores;
    std::vector<char> bytes;  // what was read
    bool read = false;
};
struct Stores {
    std::vector<Store> open;
    std::deque<Group> groups;
};
std::vector<Stores> of_thread;

void read(Group& group) {
    for (const Store& store : group.stores) {
        for (const Piece& piece : store.pieces) {
            if (piece.global == nullptr) continue;
            group.bytes.insert(group.bytes.end(), piece.shared, piece.shared + piece.bytes);
            mark_draining(piece.shared, piece.bytes, false);
        }
    }
    group.read = true;
}

void write(const Group& group) {
    const char* from = group.bytes.data();
    for (const Store& store : group.stores) {
        for (const Piece& piece : store.pieces) {
            if (piece.global == nullptr) continue;
            check_write(piece.global, piece.bytes, store.site, By::kAsyncProxy);
            memcpy(piece.global, from, piece.bytes);
            from += piece.bytes;
        }
    }
}

void store(std::vector<Piece> pieces, Site site) {
    for (const Piece& piece : pieces) {
        check_shared(piece.shared, piece.bytes, "bulk store", site);
        if (piece.global == nullptr) continue;
        check_read(piece.shared, piece.bytes, site, By::kAsyncProxy);
        mark_draining(piece.shared, piece.bytes, true);
    }
    of_thread[current->id].open.push_back({std::move(pieces), site});
}

void check_bulk(const void* shared, const void* global, int bytes, Site site) {
    check_aligned(shared, 16, "bulk copy", site);
    check_aligned(global, 16, "bulk copy", site);
    if (bytes <= 0 || bytes % 16 != 0) fail(site, "bulk copy of %d bytes: not a multiple of 16", bytes);
}

}  // namespace

void begin_bulk_stores(size_t count) { of_thread.assign(count, {}); }

void end_bulk_stores(Thread& thread) {
    Stores& stores = of_thread[thread.id];
    if (!stores.open.empty()) fail(stores.open[0].site, "thread ends with a bulk store that was never committed");
    for (const Group& group : stores.groups) {
        if (!group.read) fail(group.stores[0].site, "thread ends while its bulk store reads shared memory");
        write(group);
    }
}

void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier, Site site) {
    check_bulk(to, from, bytes, site);
    char* const source = static_cast<char*>(const_cast<void*>(from));
    bulk_copy_in({{static_cast<char*>(to), source, static_cast<size_t>(bytes)}}, bytes, barrier, site);
}

void bulk_store(void* to, const void* from, int bytes, Site site) {
    check_bulk(from, to, bytes, site);
    char* const source = static_cast<char*>(const_cast<void*>(from));
    store({{source, static_cast<char*>(to), static_cast<size_t>(bytes)}}, site);
}

void bulk_commit() {
    Stores& stores = of_thread[current->id];
    stores.groups.push_back({std::move(stores.open), {}, false});
    stores.open.clear();
}

void bulk_wait(int pending, bool read_only) {
    auto& groups = of_thread[current->id].groups;
    const size_t count = groups.size();
    for (size_t i = 0; i + static_cast<size_t>(pending) < count; i++) {
        Group& group = groups[read_only ? i : 0];
        if (!group.read) read(group);
        if (read_only) continue;
        write(group);
        groups.pop_front();
    }
}

bool encode_tensor_map(CUtensorMap& encoded, int element_bytes, int rank, void* base, const uint64_t* size,
                       const uint64_t* stride, const uint32_t* box, int swizzle) {
    if (rank < 1 || rank > kMaxRank || reinterpret_cast<uintptr_t>(base) % 16 != 0) return false;
    Map map{};
    map.encoded = kEncoded;
    map.base = static_cast<char*>(base);
    map.element_bytes = static_cast<uint32_t>(element_bytes);
    map.rank = static_cast<uint32_t>(rank);
    map.swizzle_bits = swizzle == 128 ? 3 : swizzle == 64 ? 2 : swizzle == 32 ? 1 : 0;
    for (int i = 0; i < rank; i++) {
        map.size[i] = size[i];
        map.box[i] = box[i];
        map.stride[i] = i == 0 ? map.element_bytes : stride[i - 1];
        if (size[i] < 1 || size[i] > uint64_t{1} << 32 || box[i] < 1 || box[i] > kMaxBox) return false;
        if (i > 0 && (map.stride[i] % 16 != 0 || map.stride[i] >= uint64_t{1} << 40)) return false;
    }
    const uint32_t row = map.box[0] * map.element_bytes;
    if (row % 16 != 0) return false;
    // A row narrower than the swizzle is allowed on the device; none of our kernels has one, and here it would be a
    // slip.
    if (swizzle != 0 && row != static_cast<uint32_t>(swizzle)) return false;
    memcpy(&encoded, &map, sizeof map);
    return true;
}

void tensor_load(void* to, const CUtensorMap& encoded, const int* at, int rank, uint64_t* barrier, Site site) {
    const Map map = decode(encoded, rank, to, site);
    bulk_copy_in(pieces_of(map, at, to), tile_bytes(map), barrier, site);
}

void tensor_multicast(void* to, const CUtensorMap& encoded, const int* at, int rank, uint64_t* barrier, uint32_t blocks,
                      Site site) {
    const Map map = decode(encoded, rank, to, site);
    bulk_multicast(pieces_of(map, at, to), tile_bytes(map), barrier, blocks, site);
}

void tensor_store(const CUtensorMap& encoded, const int* at, int rank, const void* from, Site site) {
    const Map map = decode(encoded, rank, from, site);
    store(pieces_of(map, at, from), site);
}

}  // namespace mmk::emulator
