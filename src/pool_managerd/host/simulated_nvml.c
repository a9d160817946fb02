/* A libnvidia-ml.so.1 without a driver: it answers what the topology file says, which may change at any time.
 *
 * Only what the worker asks for is here, in the versions that the Python binding looks up. The file is read again in
 * every call when it has changed; one that is missing, half written or wrong leaves what was known before.
 */
#include "simulated_topology.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { OK, UNINITIALIZED, INVALID, UNSUPPORTED, NO_PERMISSION, NOT_FOUND = 6, TOO_SMALL, NO_DRIVER = 9, TIMEOUT, LOST = 15,
       UNKNOWN = 999 };
enum { MAX_HANDLES = 1024, MAX_SETS = 8, MAX_WATCHED = 64, MAX_SEEN = 1024, MAX_ENVIRON = 128 * 1024 };
enum { DOUBLE_BIT_ECC = 2, CRITICAL_XID = 8, GET_RECOVERY_ACTION = 230 };
#define TURN_NS 50000000L
#define ENGINES_FRESH_NS 50000000L

typedef struct { char uuid[TEXT]; } *device;
typedef struct { char bus_legacy[16]; unsigned domain, bus, device, ids, subsystem; char bus_id[32]; } pci_info;
typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } process_info;
typedef struct { unsigned id, scope; long long stamp, latency; int type, result; unsigned long long value; } field_value;
typedef struct { device which; unsigned long long type, data; unsigned gi, ci; } event;

struct event_set {
    int taken, watched_count, seen_count, seen_next;
    char watched[MAX_WATCHED][TEXT];
    unsigned long long errors[MAX_WATCHED];
    struct { char uuid[TEXT]; unsigned long long serial; } seen[MAX_SEEN];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct topology now, draft;
static struct stat last;
static struct event_set sets[MAX_SETS];
static struct { char uuid[TEXT]; } handles[MAX_HANDLES];
static struct process engines[MAX_PROCESSES];
static struct timespec engines_at;
static int initialised, known, handle_count, engine_count;

/* --- the file --- */

static void refresh(void)
{
    const char *path = getenv("POOL_MANAGERD_SIMULATED_GPUS");
    struct stat s;
    if (!path || stat(path, &s))
        return;
    if (known && s.st_ino == last.st_ino && s.st_size == last.st_size && s.st_mtim.tv_sec == last.st_mtim.tv_sec
        && s.st_mtim.tv_nsec == last.st_mtim.tv_nsec)
        return;
    if (read_topology(path, &draft))
        return; /* read again at the next call: it may be whole then */
    now = draft;
    last = s;
    known = 1;
    engines_at.tv_sec = 0;
}

static int misbehave(enum scan_fault fault, int error)
{
    if (fault == ABORT)
        abort();
    while (fault == HANG)
        pause();
    return error;
}

/* Takes the lock and finds the device. On anything but OK the lock is not held. */
static int enter(device handle, struct unit **out)
{
    int result = OK;
    pthread_mutex_lock(&lock);
    refresh();
    if (!initialised)
        result = UNINITIALIZED;
    else if ((char *)handle < (char *)handles || (char *)handle >= (char *)(handles + handle_count))
        result = INVALID;
    if (result) {
        pthread_mutex_unlock(&lock);
        return result;
    }
    for (int i = 0; i < now.unit_count; i++) {
        struct unit *u = &now.units[i], *whole = u->parent < 0 ? u : &now.units[u->parent];
        if (strcmp(u->uuid, handle->uuid))
            continue;
        *out = u;
        if (!whole->gone && !whole->error)
            return OK;
        result = whole->error ? whole->error : LOST;
        pthread_mutex_unlock(&lock);
        return result;
    }
    pthread_mutex_unlock(&lock);
    return strncmp(handle->uuid, "MIG-", 4) ? LOST : NOT_FOUND;
}

static int leave(int result)
{
    pthread_mutex_unlock(&lock);
    return result;
}

static device handle_of(const char *uuid)
{
    for (int i = 0; i < handle_count; i++)
        if (!strcmp(handles[i].uuid, uuid))
            return (device)&handles[i];
    if (handle_count == MAX_HANDLES)
        return NULL;
    strcpy(handles[handle_count].uuid, uuid);
    return (device)&handles[handle_count++];
}

/* The position of the GPU that has this index: those that are not gone, by their number. */
static int by_index(unsigned index)
{
    for (int number = 0; number < 1000; number++)
        for (int i = 0; i < now.unit_count; i++)
            if (now.units[i].parent < 0 && !now.units[i].gone && now.units[i].number == number && !index--)
                return i;
    return -1;
}

/* --- engines: live processes whose environment names a device --- */

static int names_unit(const char *word, size_t length, int unit)
{
    const struct unit *u = &now.units[unit];
    if (length >= 4 && !strncmp(u->uuid, word, length))
        return 1; /* CUDA takes a UUID's beginning, too */
    char digits[8] = {0};
    if (u->parent >= 0 || !length || length >= sizeof digits || !isdigit((unsigned char)*word))
        return 0;
    memcpy(digits, word, length);
    return by_index((unsigned)atoi(digits)) == unit;
}

static unsigned long long resident(const char *pid)
{
    char path[64];
    unsigned long long pages = 0;
    snprintf(path, sizeof path, "/proc/%.12s/statm", pid);
    FILE *file = fopen(path, "re");
    if (file && fscanf(file, "%*u %llu", &pages) != 1)
        pages = 0;
    if (file)
        fclose(file);
    return pages * (unsigned long long)sysconf(_SC_PAGESIZE);
}

static void note_engine(const char *pid, const char *mask)
{
    unsigned long long bytes = now.engine_bytes;
    for (const char *word = mask; *word; word += strspn(word, ", ")) {
        size_t length = strcspn(word, ", ");
        for (int i = 0; length && i < now.unit_count; i++)
            if (engine_count < MAX_PROCESSES && names_unit(word, length, i)) {
                if (!bytes)
                    bytes = resident(pid);
                engines[engine_count++] = (struct process){.unit = i, .pid = (unsigned)atoi(pid), .vram = bytes};
            }
        word += length;
    }
}

static void look_for_engines(void)
{
    static char text[MAX_ENVIRON + 1];
    static const char key[] = "CUDA_VISIBLE_DEVICES=";
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    if (engines_at.tv_sec && (t.tv_sec - engines_at.tv_sec) * 1000000000L + t.tv_nsec - engines_at.tv_nsec < ENGINES_FRESH_NS)
        return;
    engines_at = t;
    engine_count = 0;
    DIR *proc = now.engines ? opendir("/proc") : NULL;
    for (struct dirent *e; proc && (e = readdir(proc));) {
        char path[64];
        if (!isdigit((unsigned char)*e->d_name) || atoi(e->d_name) == getpid())
            continue;
        snprintf(path, sizeof path, "/proc/%.12s/environ", e->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t length = 0;
        for (ssize_t n; fd >= 0 && length < MAX_ENVIRON && (n = read(fd, text + length, (size_t)(MAX_ENVIRON - length))) > 0;)
            length += n;
        if (fd >= 0)
            close(fd);
        text[length] = 0;
        for (char *p = text; p < text + length; p += strlen(p) + 1)
            if (!strncmp(p, key, sizeof key - 1)) {
                note_engine(e->d_name, p + sizeof key - 1);
                break;
            }
    }
    if (proc)
        closedir(proc);
}

/* Whether a process on unit p counts on unit u: its own, or those of the MIG instances of a GPU. */
static int counts_on(int p, const struct unit *u)
{
    int unit = (int)(u - now.units);
    return p == unit || now.units[p].parent == unit;
}

static unsigned long long used_by_processes(const struct unit *u)
{
    unsigned long long used = 0;
    look_for_engines();
    for (int i = 0; i < now.process_count; i++)
        if (counts_on(now.processes[i].unit, u) && now.processes[i].vram != UNKNOWN_BYTES)
            used += now.processes[i].vram;
    for (int i = 0; i < engine_count; i++)
        if (counts_on(engines[i].unit, u))
            used += engines[i].vram;
    for (int i = 0; i < now.unit_count; i++)
        if (counts_on(i, u))
            used += now.units[i].usage;
    return used;
}

static int list_processes(device handle, unsigned *count, process_info *out, int graphics)
{
    struct unit *u;
    unsigned found = 0, room = out ? *count : 0;
    int result = enter(handle, &u);
    if (result)
        return result;
    look_for_engines();
    for (int i = 0; i < now.process_count + (graphics ? 0 : engine_count); i++) {
        const struct process *p = i < now.process_count ? &now.processes[i] : &engines[i - now.process_count];
        if (!counts_on(p->unit, u) || p->graphics != graphics)
            continue;
        const struct unit *on = &now.units[p->unit];
        unsigned gi = on->parent < 0 ? ~0u : (unsigned)on->gi, ci = on->parent < 0 ? ~0u : (unsigned)on->ci;
        if (found < room)
            out[found] = (process_info){p->pid, p->vram, gi, ci};
        found++;
    }
    *count = found;
    return leave(found > room ? TOO_SMALL : OK);
}

/* --- the library's own life --- */

int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    pthread_mutex_lock(&lock);
    refresh();
    enum scan_fault fault = now.init_fault;
    int error = known ? now.init_error : NO_DRIVER;
    if (!error && fault == NO_FAULT)
        initialised++;
    pthread_mutex_unlock(&lock);
    return misbehave(fault, error);
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void)
{
    pthread_mutex_lock(&lock);
    return leave(initialised ? (initialised--, OK) : UNINITIALIZED);
}

const char *nvmlErrorString(int code)
{
    switch (code) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID: return "Invalid Argument";
    case UNSUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case TOO_SMALL: return "Insufficient Size";
    case NO_DRIVER: return "Driver Not Loaded";
    case TIMEOUT: return "Timeout";
    case LOST: return "GPU is lost";
    case 16: return "GPU requires reset";
    case 18: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}

static int copy_out(char *to, unsigned room, const char *text)
{
    if (strlen(text) >= room)
        return TOO_SMALL;
    strcpy(to, text);
    return OK;
}

static int node_text(char *to, unsigned room, const char *text)
{
    pthread_mutex_lock(&lock);
    refresh();
    return leave(initialised ? copy_out(to, room, text) : UNINITIALIZED);
}

int nvmlSystemGetDriverVersion(char *to, unsigned room) { return node_text(to, room, now.driver); }

int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    pthread_mutex_lock(&lock);
    refresh();
    *version = now.cuda;
    return leave(initialised ? OK : UNINITIALIZED);
}

int nvmlSystemGetProcessName(unsigned pid, char *to, unsigned room)
{
    (void)pid, (void)to, (void)room;
    return NOT_FOUND; /* the worker reads /proc then */
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    pthread_mutex_lock(&lock);
    refresh();
    engines_at.tv_sec = 0; /* a scan begins: nothing of the last one is shown again */
    *count = 0;
    for (int i = 0; i < now.unit_count; i++)
        *count += now.units[i].parent < 0 && !now.units[i].gone;
    enum scan_fault fault = now.scan_fault;
    int error = initialised ? now.scan_error : UNINITIALIZED;
    pthread_mutex_unlock(&lock);
    return misbehave(fault, error);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *out)
{
    pthread_mutex_lock(&lock);
    refresh();
    int at = by_index(index);
    if (!initialised || at < 0)
        return leave(initialised ? INVALID : UNINITIALIZED);
    *out = handle_of(now.units[at].uuid);
    return leave(now.units[at].error ? now.units[at].error : *out ? OK : UNKNOWN);
}

/* --- one device --- */

#define DEVICE_CALL(name, parameters, body)                      \
    int name parameters                                          \
    {                                                            \
        struct unit *u;                                          \
        int result = enter(handle, &u);                          \
        if (result)                                              \
            return result;                                       \
        body;                                                    \
        return leave(result);                                    \
    }
#define WHOLE_GPU if (u->parent >= 0) return leave(INVALID)

DEVICE_CALL(nvmlDeviceGetUUID, (device handle, char *to, unsigned room), result = copy_out(to, room, u->uuid))
DEVICE_CALL(nvmlDeviceGetName, (device handle, char *to, unsigned room), result = copy_out(to, room, u->name))
DEVICE_CALL(nvmlDeviceGetCudaComputeCapability, (device handle, int *major, int *minor), *major = u->major; *minor = u->minor)
DEVICE_CALL(nvmlDeviceGetTemperature, (device handle, int sensor, unsigned *out),
            (void)sensor; WHOLE_GPU; *out = (unsigned)u->temperature)
DEVICE_CALL(nvmlDeviceGetPowerUsage, (device handle, unsigned *out), WHOLE_GPU; *out = (unsigned)u->power_mw)
DEVICE_CALL(nvmlDeviceGetUtilizationRates, (device handle, unsigned out[2]),
            if (u->mig || u->parent >= 0) return leave(UNSUPPORTED); out[0] = (unsigned)u->utilization; out[1] = 0)
DEVICE_CALL(nvmlDeviceGetPersistenceMode, (device handle, int *out), WHOLE_GPU; *out = u->persistence)
DEVICE_CALL(nvmlDeviceGetTotalEccErrors, (device handle, int type, int counter, unsigned long long *out),
            (void)counter; if (!u->ecc) return leave(UNSUPPORTED); *out = type == 1 ? u->ecc_errors : 0)
DEVICE_CALL(nvmlDeviceGetRemappedRows, (device handle, unsigned *fixed, unsigned *bad, unsigned *pending, unsigned *failed),
            WHOLE_GPU; if (u->major < 8) return leave(UNSUPPORTED); *fixed = *failed = 0; *bad = *pending = (unsigned)u->pending)
DEVICE_CALL(nvmlDeviceGetRetiredPagesPendingStatus, (device handle, int *pending),
            WHOLE_GPU; if (u->major >= 8) return leave(UNSUPPORTED); *pending = u->pending)
DEVICE_CALL(nvmlDeviceGetNumaNodeId, (device handle, int *out), if (u->numa < 0) return leave(UNSUPPORTED); *out = u->numa)
DEVICE_CALL(nvmlDeviceGetFieldValues, (device handle, int count, field_value *values),
            WHOLE_GPU; for (int i = 0; i < count; i++) {
                values[i].result = values[i].id == GET_RECOVERY_ACTION && u->tells_recovery ? OK : UNSUPPORTED;
                values[i].value = (unsigned)u->recovery; })
DEVICE_CALL(nvmlDeviceGetMigMode, (device handle, unsigned *current, unsigned *pending),
            WHOLE_GPU; if (u->major < 8) return leave(UNSUPPORTED); *current = *pending = (unsigned)u->mig)
DEVICE_CALL(nvmlDeviceGetMaxMigDeviceCount, (device handle, unsigned *out), *out = u->mig ? 7 : 0)
DEVICE_CALL(nvmlDeviceGetGpuInstanceId, (device handle, unsigned *out),
            if (u->parent < 0) return leave(INVALID); *out = (unsigned)u->gi)

DEVICE_CALL(nvmlDeviceGetMigDeviceHandleByIndex, (device handle, unsigned index, device *out),
            int unit = (int)(u - now.units);
            result = NOT_FOUND;
            for (int i = 0; i < now.unit_count; i++)
                if (now.units[i].parent == unit && !index--) {
                    *out = handle_of(now.units[i].uuid);
                    result = *out ? OK : UNKNOWN;
                })

static void fill_pci(const struct unit *u, pci_info *out)
{
    memset(out, 0, sizeof *out);
    out->domain = u->domain;
    out->bus = u->bus;
    out->device = u->device;
    snprintf(out->bus_legacy, sizeof out->bus_legacy, "%04X:%02X:%02X.0", u->domain & 0xffff, u->bus & 0xff, u->device & 0xff);
    snprintf(out->bus_id, sizeof out->bus_id, "%08X:%02X:%02X.0", u->domain, u->bus, u->device);
}

DEVICE_CALL(nvmlDeviceGetPciInfo_v3, (device handle, pci_info *out), fill_pci(u, out))

static int memory(device handle, memory_v2 *out)
{
    struct unit *u;
    int result = enter(handle, &u);
    if (result)
        return result;
    if (u->no_memory_info)
        return leave(UNSUPPORTED);
    unsigned long long room = u->vram - u->reserved, used = used_by_processes(u);
    out->total = u->vram;
    out->reserved = u->reserved;
    out->used = used < room ? used : room;
    out->free = room - out->used;
    return leave(OK);
}

int nvmlDeviceGetMemoryInfo_v2(device handle, memory_v2 *out) { return memory(handle, out); }

int nvmlDeviceGetMemoryInfo(device handle, memory_v1 *out)
{
    memory_v2 full = {0};
    int result = memory(handle, &full);
    *out = (memory_v1){full.total, full.free, full.used + full.reserved};
    return result;
}

int nvmlDeviceGetComputeRunningProcesses_v3(device handle, unsigned *count, process_info *out)
{
    return list_processes(handle, count, out, 0);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(device handle, unsigned *count, process_info *out)
{
    return list_processes(handle, count, out, 1);
}

DEVICE_CALL(nvmlDeviceGetNvLinkState, (device handle, unsigned link, unsigned *out),
            if (!u->link_count) return leave(UNSUPPORTED); if (link >= MAX_LINKS) return leave(INVALID);
            *out = (int)link < u->link_count)

DEVICE_CALL(nvmlDeviceGetNvLinkRemotePciInfo_v2, (device handle, unsigned link, pci_info *out),
            const struct unit bridge = {.domain = 0xffff};
            if ((int)link >= u->link_count) return leave(UNSUPPORTED);
            fill_pci(u->links[link] == TO_SWITCH ? &bridge : &now.units[u->links[link]], out))

/* --- events --- */

int nvmlEventSetCreate(struct event_set **out)
{
    pthread_mutex_lock(&lock);
    for (int i = 0; initialised && i < MAX_SETS; i++)
        if (!sets[i].taken) {
            memset(&sets[i], 0, sizeof sets[i]);
            sets[i].taken = 1;
            *out = &sets[i];
            return leave(OK);
        }
    return leave(initialised ? UNKNOWN : UNINITIALIZED);
}

int nvmlEventSetFree(struct event_set *set)
{
    pthread_mutex_lock(&lock);
    set->taken = 0;
    return leave(OK);
}

static int is_new(struct event_set *set, const char *uuid, unsigned long long serial)
{
    for (int i = 0; i < set->seen_count; i++)
        if (set->seen[i].serial == serial && !strcmp(set->seen[i].uuid, uuid))
            return 0;
    strcpy(set->seen[set->seen_next].uuid, uuid);
    set->seen[set->seen_next].serial = serial;
    set->seen_next = (set->seen_next + 1) % MAX_SEEN;
    set->seen_count += set->seen_count < MAX_SEEN;
    return 1;
}

/* The whole GPU's UUID, for an event of a MIG instance too. */
static const char *whole_uuid(int unit)
{
    int parent = now.units[unit].parent;
    return now.units[parent < 0 ? unit : parent].uuid;
}

static int watched_at(const struct event_set *set, const char *uuid)
{
    for (int i = 0; i < set->watched_count; i++)
        if (!strcmp(set->watched[i], uuid))
            return i;
    return -1;
}

DEVICE_CALL(nvmlDeviceRegisterEvents, (device handle, unsigned long long types, struct event_set *set),
            WHOLE_GPU;
            if ((types & DOUBLE_BIT_ECC) && !u->ecc) return leave(UNSUPPORTED); /* all or nothing, as the real one */
            if (watched_at(set, u->uuid) >= 0) return leave(OK);
            if (set->watched_count == MAX_WATCHED) return leave(UNKNOWN);
            set->errors[set->watched_count] = u->ecc_errors;
            strcpy(set->watched[set->watched_count++], u->uuid);
            for (int i = 0; i < now.xid_count; i++) /* what happened before is history */
                if (!strcmp(whole_uuid(now.xids[i].unit), u->uuid))
                    is_new(set, u->uuid, now.xids[i].serial))

static int next_event(struct event_set *set, event *out)
{
    for (int i = 0; i < now.xid_count; i++) {
        const char *uuid = whole_uuid(now.xids[i].unit);
        if (watched_at(set, uuid) >= 0 && is_new(set, uuid, now.xids[i].serial)) {
            *out = (event){handle_of(uuid), CRITICAL_XID, now.xids[i].code, ~0u, ~0u};
            return 1;
        }
    }
    for (int i = 0; i < now.unit_count; i++) {
        int at = now.units[i].parent < 0 ? watched_at(set, now.units[i].uuid) : -1;
        unsigned long long before = at < 0 ? 0 : set->errors[at];
        if (at >= 0)
            set->errors[at] = now.units[i].ecc_errors;
        if (at >= 0 && now.units[i].ecc_errors > before) {
            *out = (event){handle_of(now.units[i].uuid), DOUBLE_BIT_ECC, now.units[i].ecc_errors, ~0u, ~0u};
            return 1;
        }
    }
    return 0;
}

int nvmlEventSetWait_v2(struct event_set *set, event *out, unsigned timeout_ms)
{
    const struct timespec turn = {0, TURN_NS};
    for (long left = timeout_ms;; left -= TURN_NS / 1000000) {
        pthread_mutex_lock(&lock);
        refresh();
        int result = !initialised ? UNINITIALIZED : next_event(set, out) ? OK : TIMEOUT;
        pthread_mutex_unlock(&lock);
        if (result != TIMEOUT || left <= 0)
            return result;
        nanosleep(&turn, NULL);
    }
}

/* --- not of NVML: for the worker and the tests of this project --- */

/* How many GPUs the file has, those included that are gone. */
int simulatedCards(void)
{
    int count = 0;
    pthread_mutex_lock(&lock);
    refresh();
    for (int i = 0; i < now.unit_count; i++)
        count += now.units[i].parent < 0;
    return leave(count);
}

/* Whether the listed pids are those of an outer pid namespace, as an old driver's are in a container. */
int simulatedPidsAreOuter(void)
{
    pthread_mutex_lock(&lock);
    refresh();
    return leave(now.outer_pids);
}

/* The line where a topology file is wrong, with the reason in *why; 0 when it is not, -1 when it cannot be read. */
int simulatedCheck(const char *path, char *why, size_t room)
{
    pthread_mutex_lock(&lock);
    int line = read_topology(path, &draft);
    snprintf(why, room, "%s", line > 0 ? topology_mistake() : "");
    return leave(line);
}
