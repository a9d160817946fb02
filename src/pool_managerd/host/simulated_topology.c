/* Reads a topology file. docs/reference/simulated-gpus.md has the grammar; simulation.py checks the same one. */
#include "simulated_topology.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_WORDS = 32, MAX_FILE = 256 * 1024 };

struct words {
    char *word[MAX_WORDS];
    int count, used[MAX_WORDS];
};

/* Splits a line at blanks; double quotes keep blanks, # at a word's beginning starts a comment. */
static int split(char *line, struct words *out)
{
    char *p = line;
    memset(out, 0, sizeof *out);
    for (;;) {
        while (*p == ' ' || *p == '\t')
            p++;
        if (!*p || *p == '#')
            return 1;
        if (out->count == MAX_WORDS)
            return 0;
        char *to = p;
        int quoted = 0;
        out->word[out->count++] = p;
        for (; *p && (quoted || (*p != ' ' && *p != '\t')); p++)
            if (*p == '"')
                quoted = !quoted;
            else
                *to++ = *p;
        if (quoted)
            return 0;
        if (*p)
            p++;
        *to = 0;
    }
}

/* The value of key, once; NULL when the key is not there. */
static char *take(struct words *w, const char *key)
{
    size_t length = strlen(key);
    for (int i = 1; i < w->count; i++)
        if (!w->used[i] && !strncmp(w->word[i], key, length) && w->word[i][length] == '=') {
            w->used[i] = 1;
            return w->word[i] + length + 1;
        }
    return NULL;
}

/* Whether nothing is left over: an unknown key, a key given twice, a word too many. */
static int all_used(const struct words *w)
{
    for (int i = 1; i < w->count; i++)
        if (!w->used[i])
            return 0;
    return 1;
}

static int number(const char *text, unsigned long long most, unsigned long long *out)
{
    size_t digits = text ? strspn(text, "0123456789") : 0;
    if (!digits || digits > 18 || text[digits])
        return 0;
    *out = strtoull(text, NULL, 10);
    return *out <= most;
}

/* An optional whole number: 1 when absent or right. */
static int maybe_int(struct words *w, const char *key, int most, int *out)
{
    unsigned long long value;
    char *text = take(w, key);
    if (!text)
        return 1;
    if (!number(text, (unsigned long long)most, &value))
        return 0;
    *out = (int)value;
    return 1;
}

static int size_of(const char *text, unsigned long long *out)
{
    static const struct { const char *suffix; int shift; } unit[] = {{"B", 0}, {"KiB", 10}, {"MiB", 20}, {"GiB", 30}};
    char digits[16];
    size_t length = text ? strspn(text, "0123456789") : 0;
    if (!length || length > 12)
        return 0;
    memcpy(digits, text, length);
    digits[length] = 0;
    for (size_t i = 0; i < sizeof unit / sizeof *unit; i++)
        if (!strcmp(text + length, unit[i].suffix)) {
            *out = strtoull(digits, NULL, 10);
            if (*out > (1ULL << 50) >> unit[i].shift)
                return 0;
            *out <<= unit[i].shift;
            return 1;
        }
    return 0;
}

static int maybe_size(struct words *w, const char *key, unsigned long long *out)
{
    char *text = take(w, key);
    return !text || size_of(text, out);
}

static int maybe_switch(struct words *w, const char *key, int *out)
{
    char *text = take(w, key);
    if (!text)
        return 1;
    *out = !strcmp(text, "on");
    return *out || !strcmp(text, "off");
}

static int maybe_text(struct words *w, const char *key, char *out)
{
    char *text = take(w, key);
    if (!text)
        return 1;
    if (!*text || strlen(text) >= TEXT)
        return 0;
    strcpy(out, text);
    return 1;
}

static int two_numbers(const char *text, int *major, int *minor)
{
    char copy[16];
    unsigned long long a, b;
    if (!text || strlen(text) >= sizeof copy)
        return 0;
    char *dot = strchr(strcpy(copy, text), '.');
    if (!dot)
        return 0;
    *dot = 0;
    if (!number(copy, 99, &a) || !number(dot + 1, 99, &b))
        return 0;
    *major = (int)a;
    *minor = (int)b;
    return 1;
}

static int pci_of(const char *text, struct unit *u)
{
    static const char shape[] = "xxxx:xx:xx.d";
    if (strlen(text) != sizeof shape - 1)
        return 0;
    for (size_t i = 0; i < sizeof shape - 1; i++)
        if (shape[i] == 'x' ? !isxdigit((unsigned char)text[i]) : shape[i] == 'd' ? text[i] != '0' : text[i] != shape[i])
            return 0;
    sscanf(text, "%x:%x:%x", &u->domain, &u->bus, &u->device);
    return 1;
}

static int find_gpu(const struct topology *t, const char *text)
{
    unsigned long long wanted;
    if (!number(text, 999, &wanted))
        return -1;
    for (int i = 0; i < t->unit_count; i++)
        if (t->units[i].parent < 0 && t->units[i].number == (int)wanted)
            return i;
    return -1;
}

/* The unit that gpu=N or mig=UUID names. */
static int find_unit(const struct topology *t, struct words *w)
{
    char *gpu = take(w, "gpu"), *mig = take(w, "mig");
    if (!gpu == !mig)
        return -1;
    if (gpu)
        return find_gpu(t, gpu);
    for (int i = 0; i < t->unit_count; i++)
        if (t->units[i].parent >= 0 && !strcmp(t->units[i].uuid, mig))
            return i;
    return -1;
}

static int good_uuid(const struct topology *t, const char *uuid, const char *prefix)
{
    if (strncmp(uuid, prefix, 4) || strlen(uuid) < 5 || strlen(uuid) > 79)
        return 0;
    for (const char *p = uuid; *p; p++)
        if (!isalnum((unsigned char)*p) && *p != '-' && *p != '/')
            return 0;
    for (int i = 0; i < t->unit_count; i++)
        if (!strcmp(t->units[i].uuid, uuid))
            return 0;
    return 1;
}

static int on_gpu(struct topology *t, struct words *w)
{
    unsigned long long value;
    if (t->unit_count == MAX_UNITS || w->count < 2 || !number(w->word[1], 999, &value) || find_gpu(t, w->word[1]) >= 0)
        return 0;
    struct unit *u = &t->units[t->unit_count];
    *u = (struct unit){.number = (int)value, .parent = -1, .major = 8, .minor = 6, .numa = -1, .persistence = 1,
                       .bus = (unsigned)(value + 1) & 255, .domain = (unsigned)(value + 1) >> 8,
                       .temperature = 40, .power_mw = 30000};
    snprintf(u->uuid, TEXT, "GPU-00000000-0000-0000-0000-%012llu", value);
    strcpy(u->name, "NVIDIA Simulated GPU");
    w->used[1] = 1;
    char *pci = take(w, "pci"), *cc = take(w, "cc");
    int watts = 30;
    if (!maybe_text(w, "uuid", u->uuid) || !good_uuid(t, u->uuid, "GPU-") || !maybe_text(w, "name", u->name)
        || !size_of(take(w, "vram"), &u->vram) || !maybe_size(w, "reserved", &u->reserved) || u->reserved > u->vram
        || (pci && !pci_of(pci, u)) || (cc && !two_numbers(cc, &u->major, &u->minor))
        || !maybe_int(w, "numa", 1023, &u->numa) || !maybe_int(w, "temperature", 200, &u->temperature)
        || !maybe_int(w, "power", 9999, &watts) || !maybe_int(w, "utilization", 100, &u->utilization)
        || !maybe_switch(w, "ecc", &u->ecc) || !maybe_switch(w, "persistence", &u->persistence) || !all_used(w))
        return 0;
    u->power_mw = watts * 1000;
    t->unit_count++;
    return 1;
}

static int on_mig(struct topology *t, struct words *w)
{
    int parent = w->count < 2 ? -1 : find_gpu(t, w->word[1]);
    if (parent < 0 || t->unit_count == MAX_UNITS)
        return 0;
    struct unit *u = &t->units[t->unit_count];
    char profile[TEXT] = "1g";
    *u = t->units[parent];
    u->parent = parent;
    u->usage = u->reserved = 0;
    w->used[1] = 1;
    char *uuid = take(w, "uuid");
    if (!uuid || !good_uuid(t, uuid, "MIG-") || !size_of(take(w, "vram"), &u->vram) || !maybe_text(w, "profile", profile)
        || !maybe_int(w, "gi", 99, &u->gi) || !maybe_int(w, "ci", 99, &u->ci) || !all_used(w))
        return 0;
    strcpy(u->uuid, uuid);
    strcpy(u->name + strnlen(u->name, 60), " MIG ");
    strncat(u->name, profile, 30);
    t->units[parent].mig = 1;
    t->unit_count++;
    return 1;
}

static int on_nvlink(struct topology *t, struct words *w)
{
    int a = w->count == 3 ? find_gpu(t, w->word[1]) : -1;
    int to_switch = w->count == 3 && !strcmp(w->word[2], "switch");
    int b = w->count == 3 && !to_switch ? find_gpu(t, w->word[2]) : -1;
    if (a < 0 || a == b || (b < 0 && !to_switch) || t->units[a].link_count == MAX_LINKS)
        return 0;
    if (b >= 0 && t->units[b].link_count == MAX_LINKS)
        return 0;
    t->units[a].links[t->units[a].link_count++] = to_switch ? TO_SWITCH : b;
    if (b >= 0)
        t->units[b].links[t->units[b].link_count++] = a;
    return 1;
}

static int on_process(struct topology *t, struct words *w)
{
    unsigned long long pid;
    char *vram = take(w, "vram"), *kind = take(w, "kind");
    struct process p = {.unit = find_unit(t, w), .graphics = kind && !strcmp(kind, "graphics"), .vram = UNKNOWN_BYTES};
    if (t->process_count == MAX_PROCESSES || p.unit < 0 || !number(take(w, "pid"), 4194304, &pid) || !vram
        || (strcmp(vram, "unknown") && !size_of(vram, &p.vram)) || (kind && !p.graphics && strcmp(kind, "compute"))
        || !all_used(w))
        return 0;
    p.pid = (unsigned)pid;
    t->processes[t->process_count++] = p;
    return 1;
}

static int on_xid(struct topology *t, struct words *w)
{
    struct xid x = {.unit = find_unit(t, w)};
    if (t->xid_count == MAX_XIDS || x.unit < 0 || !number(take(w, "code"), 9999, &x.code)
        || !number(take(w, "serial"), 999999999, &x.serial) || !all_used(w))
        return 0;
    t->xids[t->xid_count++] = x;
    return 1;
}

static int fault_of(const char *text, enum scan_fault value, struct topology *t)
{
    if (!strcmp(text, "init"))
        t->init_fault = value;
    else if (!strcmp(text, "scan"))
        t->scan_fault = value;
    else
        return 0;
    return 1;
}

static int on_fault(struct topology *t, struct words *w)
{
    char *hang = take(w, "hang"), *abort_ = take(w, "abort");
    if (hang || abort_)
        return w->count == 2 && (hang ? fault_of(hang, HANG, t) : fault_of(abort_, ABORT, t));
    if (w->count == 3 && !strcmp(w->word[2], "gone") && !strncmp(w->word[1], "gpu=", 4)) {
        int gpu = find_gpu(t, w->word[1] + 4);
        if (gpu >= 0)
            t->units[gpu].gone = 1;
        return gpu >= 0;
    }
    if (w->count == 3 && !strncmp(w->word[1], "gpu=", 4)) {
        int gpu = find_unit(t, w);
        return gpu >= 0 && maybe_int(w, "error", 999, &t->units[gpu].error) && all_used(w);
    }
    return w->count == 2 && maybe_int(w, "init", 999, &t->init_error) && maybe_int(w, "scan", 999, &t->scan_error)
           && all_used(w);
}

/* usage, ecc, pending, memory, recovery: one figure of one unit. */
static int on_figure(struct topology *t, struct words *w)
{
    int at = find_unit(t, w);
    if (at < 0)
        return 0;
    struct unit *u = &t->units[at];
    if (!strcmp(w->word[0], "usage"))
        return size_of(take(w, "vram"), &u->usage) && all_used(w);
    if (!strcmp(w->word[0], "ecc")) {
        u->ecc = 1;
        return number(take(w, "uncorrected"), 1000000000, &u->ecc_errors) && all_used(w);
    }
    if (!strcmp(w->word[0], "pending")) {
        u->pending = 1;
        return all_used(w);
    }
    if (!strcmp(w->word[0], "recovery"))
        return (u->tells_recovery = maybe_int(w, "action", 99, &u->recovery)) && all_used(w);
    char *info = take(w, "info");
    u->no_memory_info = 1;
    return info && !strcmp(info, "unsupported") && all_used(w);
}

static int on_node(struct topology *t, struct words *w)
{
    if (w->count != 2)
        return 0;
    if (!strcmp(w->word[0], "driver"))
        return *w->word[1] && strlen(w->word[1]) < 80 && strcpy(t->driver, w->word[1]);
    if (!strcmp(w->word[0], "cuda")) {
        int major, minor;
        if (!two_numbers(w->word[1], &major, &minor))
            return 0;
        t->cuda = major * 1000 + minor * 10;
        return 1;
    }
    if (!strcmp(w->word[0], "engines")) {
        char *vram = take(w, "vram");
        t->engines = 1;
        return vram && (!strcmp(vram, "rss") || size_of(vram, &t->engine_bytes));
    }
    char *space = take(w, "namespace");
    t->outer_pids = space && !strcmp(space, "outer");
    return space && (t->outer_pids || !strcmp(space, "own"));
}

static int on_line(struct topology *t, struct words *w)
{
    static const struct { const char *name; int (*read)(struct topology *, struct words *); } directive[] = {
        {"gpu", on_gpu}, {"mig", on_mig}, {"nvlink", on_nvlink}, {"process", on_process}, {"xid", on_xid},
        {"fault", on_fault}, {"usage", on_figure}, {"ecc", on_figure}, {"pending", on_figure}, {"memory", on_figure},
        {"recovery", on_figure},
        {"driver", on_node}, {"cuda", on_node}, {"engines", on_node}, {"pids", on_node}};
    for (size_t i = 0; i < sizeof directive / sizeof *directive; i++)
        if (!strcmp(w->word[0], directive[i].name))
            return directive[i].read(t, w);
    return 0;
}

int parse_topology(char *text, struct topology *into)
{
    struct words words;
    int line_number = 0;
    memset(into, 0, sizeof *into);
    strcpy(into->driver, "570.86.15");
    into->cuda = 12080;
    while (*text) {
        char *end = strchr(text, '\n');
        line_number++;
        if (!end)
            return line_number; /* half written */
        *end = 0;
        if (!split(text, &words) || (words.count && !on_line(into, &words)))
            return line_number;
        text = end + 1;
    }
    return 0;
}

int read_topology(const char *path, struct topology *into)
{
    static char text[MAX_FILE + 1];
    FILE *file = fopen(path, "re");
    if (!file)
        return -1;
    size_t length = fread(text, 1, sizeof text, file);
    int bad = ferror(file) || length > MAX_FILE || memchr(text, 0, length);
    fclose(file);
    if (bad)
        return -1;
    text[length] = 0;
    return parse_topology(text, into);
}
