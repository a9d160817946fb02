/* Reads a topology file. docs/reference/simulated-gpus.md has the grammar; this is its only reader. */
#include "simulated_topology.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_WORDS = 32, MAX_FILE = 256 * 1024 };

struct words {
    char *word[MAX_WORDS];
    int count, used[MAX_WORDS];
};

static char why[512];

/* Notes what is wrong with a line, as the end of a sentence, unless something was before. Always 0. */
__attribute__((format(printf, 1, 2))) static int wrong(const char *format, ...)
{
    va_list values;
    va_start(values, format);
    if (!*why)
        vsnprintf(why, sizeof why, format, values);
    va_end(values);
    return 0;
}

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
            return wrong("a line has at most %d words", MAX_WORDS);
        char *to = p;
        int quoted = 0;
        out->word[out->count++] = p;
        for (; *p && (quoted || (*p != ' ' && *p != '\t')); p++)
            if (*p == '"')
                quoted = !quoted;
            else
                *to++ = *p;
        if (quoted)
            return wrong("a quotation mark is missing");
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

/* As take, of a key that must be there. */
static char *need(struct words *w, const char *key)
{
    char *text = take(w, key);
    if (!text)
        wrong("%s needs %s=", w->word[0], key);
    return text;
}

/* Whether nothing is left over: an unknown key, a key given twice, a word too many. */
static int all_used(const struct words *w)
{
    for (int i = 1; i < w->count; i++)
        if (!w->used[i])
            return wrong("%s knows no '%.80s' here", w->word[0], w->word[i]);
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

/* A whole number that must be there. */
static int need_number(struct words *w, const char *key, unsigned long long most, unsigned long long *out)
{
    return number(take(w, key), most, out) || wrong("%s= must be a whole number up to %llu", key, most);
}

/* An optional whole number: 1 when absent or right. */
static int maybe_int(struct words *w, const char *key, int most, int *out)
{
    unsigned long long value;
    char *text = take(w, key);
    if (!text)
        return 1;
    if (!number(text, (unsigned long long)most, &value))
        return wrong("%s= must be a whole number up to %d", key, most);
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

static int bad_size(const char *key)
{
    return wrong("%s= must be a size with a unit, such as 24GiB", key);
}

static int need_size(struct words *w, const char *key, unsigned long long *out)
{
    char *text = need(w, key);
    return text && (size_of(text, out) || bad_size(key));
}

static int maybe_size(struct words *w, const char *key, unsigned long long *out)
{
    char *text = take(w, key);
    return !text || size_of(text, out) || bad_size(key);
}

static int maybe_switch(struct words *w, const char *key, int *out)
{
    char *text = take(w, key);
    if (!text)
        return 1;
    *out = !strcmp(text, "on");
    return *out || !strcmp(text, "off") || wrong("%s= must be on or off", key);
}

static int maybe_text(struct words *w, const char *key, char *out)
{
    char *text = take(w, key);
    if (!text)
        return 1;
    if (!*text || strlen(text) >= TEXT)
        return wrong("%s= must have 1 to %d bytes", key, TEXT - 1);
    strcpy(out, text);
    return 1;
}

static int two_numbers(const char *text, const char *what, int *major, int *minor)
{
    char copy[16] = {0};
    unsigned long long a, b;
    char *dot = strlen(text) < sizeof copy ? strchr(strcpy(copy, text), '.') : NULL;
    if (dot)
        *dot = 0;
    if (!dot || !number(copy, 99, &a) || !number(dot + 1, 99, &b))
        return wrong("%s must be two numbers, such as 8.6", what);
    *major = (int)a;
    *minor = (int)b;
    return 1;
}

static int pci_of(const char *text, struct unit *u)
{
    static const char shape[] = "xxxx:xx:xx.d";
    int good = strlen(text) == sizeof shape - 1;
    for (size_t i = 0; good && i < sizeof shape - 1; i++)
        good = shape[i] == 'x' ? isxdigit((unsigned char)text[i]) : text[i] == (shape[i] == 'd' ? '0' : shape[i]);
    if (!good)
        return wrong("pci= must look like 0000:01:00.0");
    sscanf(text, "%x:%x:%x", &u->domain, &u->bus, &u->device);
    return 1;
}

/* -1 where no line above declared it. */
static int declared(const struct topology *t, unsigned long long wanted)
{
    for (int i = 0; i < t->unit_count; i++)
        if (t->units[i].parent < 0 && t->units[i].number == (int)wanted)
            return i;
    return -1;
}

static int gpu_number(const char *text, unsigned long long *out)
{
    return number(text, 999, out) || wrong("a GPU's number must be a whole number up to 999");
}

static int find_gpu(const struct topology *t, const char *text)
{
    unsigned long long wanted;
    if (!gpu_number(text, &wanted))
        return -1;
    int at = declared(t, wanted);
    if (at < 0)
        wrong("there is no gpu %llu above this line", wanted);
    return at;
}

/* The unit that gpu=N or mig=UUID names. */
static int find_unit(const struct topology *t, struct words *w)
{
    char *gpu = take(w, "gpu"), *mig = take(w, "mig");
    if (!gpu == !mig)
        return wrong("%s needs either gpu= or mig=", w->word[0]) - 1;
    if (gpu)
        return find_gpu(t, gpu);
    for (int i = 0; i < t->unit_count; i++)
        if (t->units[i].parent >= 0 && !strcmp(t->units[i].uuid, mig))
            return i;
    return wrong("there is no mig %s above this line", mig) - 1;
}

static int good_uuid(const struct topology *t, const char *uuid, const char *prefix)
{
    int good = !strncmp(uuid, prefix, 4) && strlen(uuid) >= 5 && strlen(uuid) <= 79;
    for (const char *p = uuid; good && *p; p++)
        good = isalnum((unsigned char)*p) || *p == '-' || *p == '/';
    if (!good)
        return wrong("uuid= must begin with %s and have up to 79 letters, digits, - and /", prefix);
    for (int i = 0; i < t->unit_count; i++)
        if (!strcmp(t->units[i].uuid, uuid))
            return wrong("%s is there twice", uuid);
    return 1;
}

static int room(int count, int most, const char *what)
{
    return count < most || wrong("there are more than %d %s", most, what);
}

static int on_gpu(struct topology *t, struct words *w)
{
    unsigned long long value;
    if (!room(t->unit_count, MAX_UNITS, "devices") || !gpu_number(w->count < 2 ? NULL : w->word[1], &value))
        return 0;
    if (declared(t, value) >= 0)
        return wrong("gpu %llu is there twice", value);
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
        || !need_size(w, "vram", &u->vram) || !maybe_size(w, "reserved", &u->reserved)
        || (u->reserved > u->vram && !wrong("reserved= must not be more than vram="))
        || (pci && !pci_of(pci, u)) || (cc && !two_numbers(cc, "cc=", &u->major, &u->minor))
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
    int parent = find_gpu(t, w->count < 2 ? NULL : w->word[1]);
    if (parent < 0 || !room(t->unit_count, MAX_UNITS, "devices"))
        return 0;
    struct unit *u = &t->units[t->unit_count];
    char profile[TEXT] = "1g";
    *u = t->units[parent];
    u->parent = parent;
    u->usage = u->reserved = 0;
    w->used[1] = 1;
    char *uuid = need(w, "uuid");
    if (!uuid || !good_uuid(t, uuid, "MIG-") || !need_size(w, "vram", &u->vram) || !maybe_text(w, "profile", profile)
        || !maybe_int(w, "gi", 99, &u->gi) || !maybe_int(w, "ci", 99, &u->ci) || !all_used(w))
        return 0;
    strcpy(u->uuid, uuid);
    strcpy(u->name + strnlen(u->name, 60), " MIG ");
    strncat(u->name, profile, 30);
    t->units[parent].mig = 1;
    t->unit_count++;
    return 1;
}

static int link_to(struct unit *from, int to)
{
    if (from->link_count == MAX_LINKS)
        return wrong("gpu %d has more than %d links", from->number, MAX_LINKS);
    from->links[from->link_count++] = to;
    return 1;
}

static int on_nvlink(struct topology *t, struct words *w)
{
    if (w->count != 3)
        return wrong("nvlink needs two GPUs, or a GPU and the word switch");
    int to_switch = !strcmp(w->word[2], "switch");
    int a = find_gpu(t, w->word[1]), b = to_switch ? TO_SWITCH : find_gpu(t, w->word[2]);
    if (a < 0 || b == -1)
        return 0;
    if (a == b)
        return wrong("gpu %s cannot be linked with itself", w->word[1]);
    return link_to(&t->units[a], b) && (to_switch || link_to(&t->units[b], a));
}

static int on_process(struct topology *t, struct words *w)
{
    unsigned long long pid;
    struct process p = {.unit = find_unit(t, w), .vram = UNKNOWN_BYTES};
    char *vram = need(w, "vram"), *kind = take(w, "kind");
    p.graphics = kind && !strcmp(kind, "graphics");
    if (!room(t->process_count, MAX_PROCESSES, "processes") || p.unit < 0 || !need_number(w, "pid", 4194304, &pid) || !vram
        || (strcmp(vram, "unknown") && !size_of(vram, &p.vram) && !bad_size("vram"))
        || (kind && !p.graphics && strcmp(kind, "compute") && !wrong("kind= must be compute or graphics")) || !all_used(w))
        return 0;
    p.pid = (unsigned)pid;
    t->processes[t->process_count++] = p;
    return 1;
}

static int on_xid(struct topology *t, struct words *w)
{
    struct xid x = {.unit = find_unit(t, w)};
    if (!room(t->xid_count, MAX_XIDS, "xids") || x.unit < 0 || !need_number(w, "code", 9999, &x.code)
        || !need_number(w, "serial", 999999999, &x.serial) || !all_used(w))
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
        return wrong("hang= and abort= must be init or scan");
    return 1;
}

static int on_fault(struct topology *t, struct words *w)
{
    static const char needs[] = "fault needs one of init=, scan=, hang=, abort=, gpu=N error=, gpu=N gone";
    char *hang = take(w, "hang"), *abort_ = take(w, "abort");
    if (w->count != 2 && (w->count != 3 || strncmp(w->word[1], "gpu=", 4)))
        return wrong("%s", needs);
    if (hang || abort_)
        return (w->count == 2 || wrong("%s", needs)) && (hang ? fault_of(hang, HANG, t) : fault_of(abort_, ABORT, t));
    if (w->count == 3 && !strcmp(w->word[2], "gone")) {
        int gpu = find_gpu(t, w->word[1] + 4);
        if (gpu >= 0)
            t->units[gpu].gone = 1;
        return gpu >= 0;
    }
    if (w->count == 3) {
        int gpu = find_unit(t, w);
        return gpu >= 0 && maybe_int(w, "error", 999, &t->units[gpu].error) && all_used(w);
    }
    return maybe_int(w, "init", 999, &t->init_error) && maybe_int(w, "scan", 999, &t->scan_error)
           && all_used(w);
}

/* usage, ecc, pending, memory, recovery: one property of one unit. */
static int on_unit(struct topology *t, struct words *w)
{
    int at = find_unit(t, w);
    if (at < 0)
        return 0;
    struct unit *u = &t->units[at];
    if (!strcmp(w->word[0], "usage"))
        return need_size(w, "vram", &u->usage) && all_used(w);
    if (!strcmp(w->word[0], "ecc")) {
        u->ecc = 1;
        return need_number(w, "uncorrected", 1000000000, &u->ecc_errors) && all_used(w);
    }
    if (!strcmp(w->word[0], "pending")) {
        u->pending = 1;
        return all_used(w);
    }
    if (!strcmp(w->word[0], "recovery"))
        return (u->tells_recovery = maybe_int(w, "action", 99, &u->recovery)) && all_used(w);
    char *info = need(w, "info");
    u->no_memory_info = 1;
    return info && (!strcmp(info, "unsupported") || wrong("info= must be unsupported")) && all_used(w);
}

static int on_node(struct topology *t, struct words *w)
{
    if (w->count != 2)
        return wrong("%s needs one word", w->word[0]);
    if (!strcmp(w->word[0], "driver")) {
        if (!*w->word[1] || strlen(w->word[1]) >= 80)
            return wrong("driver must have 1 to 79 bytes");
        return strcpy(t->driver, w->word[1]) != NULL;
    }
    if (!strcmp(w->word[0], "cuda")) {
        int major, minor;
        if (!two_numbers(w->word[1], "cuda", &major, &minor))
            return 0;
        t->cuda = major * 1000 + minor * 10;
        return 1;
    }
    if (!strcmp(w->word[0], "engines")) {
        char *vram = need(w, "vram");
        t->engines = 1;
        return vram && (!strcmp(vram, "rss") || size_of(vram, &t->engine_bytes) || bad_size("vram"));
    }
    char *space = need(w, "namespace");
    t->outer_pids = space && !strcmp(space, "outer");
    return space && (t->outer_pids || !strcmp(space, "own") || wrong("namespace= must be own or outer"));
}

static int on_line(struct topology *t, struct words *w)
{
    static const struct { const char *name; int (*read)(struct topology *, struct words *); } directive[] = {
        {"cuda", on_node}, {"driver", on_node}, {"ecc", on_unit}, {"engines", on_node}, {"fault", on_fault}, {"gpu", on_gpu},
        {"memory", on_unit}, {"mig", on_mig}, {"nvlink", on_nvlink}, {"pending", on_unit}, {"pids", on_node},
        {"process", on_process}, {"recovery", on_unit}, {"usage", on_unit}, {"xid", on_xid}};
    char known[256] = "";
    for (size_t i = 0; i < sizeof directive / sizeof *directive; i++) {
        if (!strcmp(w->word[0], directive[i].name))
            return directive[i].read(t, w) || wrong("%s is not well formed", w->word[0]);
        strcat(strcat(known, i ? ", " : ""), directive[i].name);
    }
    return wrong("'%.40s' is no directive; there are %s", w->word[0], known);
}

int parse_topology(char *text, struct topology *into)
{
    struct words words;
    int line_number = 0;
    *why = 0;
    memset(into, 0, sizeof *into);
    strcpy(into->driver, "570.86.15");
    into->cuda = 12080;
    while (*text) {
        char *end = strchr(text, '\n');
        line_number++;
        if (!end)
            return wrong("the last line must end, too: it looks half written") + line_number;
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

const char *topology_mistake(void)
{
    return why;
}
