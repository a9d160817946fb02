/* The machine that the simulated driver shows, as its topology file describes it. */
#ifndef SIMULATED_TOPOLOGY_H
#define SIMULATED_TOPOLOGY_H

#include <stddef.h>

enum { MAX_UNITS = 512, MAX_PROCESSES = 2048, MAX_XIDS = 256, MAX_LINKS = 36, TEXT = 96, TO_SWITCH = -2 };
#define UNKNOWN_BYTES (~0ULL)

/* A GPU (parent < 0) or a MIG instance, whose parent is a position in the list. */
struct unit {
    char uuid[TEXT], name[TEXT];
    unsigned domain, bus, device;
    int number, parent, major, minor, gi, ci;
    unsigned long long vram, reserved, usage, ecc_errors;
    int numa, temperature, power_mw, utilization;
    int ecc, persistence, pending, error, gone, no_memory_info, mig, recovery, tells_recovery;
    int links[MAX_LINKS], link_count;
};

struct process {
    int unit, graphics;
    unsigned pid;
    unsigned long long vram;
};

struct xid {
    int unit;
    unsigned long long code, serial;
};

enum scan_fault { NO_FAULT, HANG, ABORT };

struct topology {
    char driver[TEXT];
    int cuda, unit_count, process_count, xid_count, outer_pids;
    int engines;                     /* whether live processes are looked for */
    unsigned long long engine_bytes; /* 0: their resident memory */
    int init_error, scan_error;
    enum scan_fault init_fault, scan_fault;
    struct unit units[MAX_UNITS];
    struct process processes[MAX_PROCESSES];
    struct xid xids[MAX_XIDS];
};

/* Fills *into from text. Returns 0, or the number of the first line that is wrong. Changes text. */
int parse_topology(char *text, struct topology *into);

/* Reads and parses a file. Returns 0, the wrong line's number, or -1 when it cannot be read. */
int read_topology(const char *path, struct topology *into);

/* What is wrong with the line that was named last, as the end of a sentence. */
const char *topology_mistake(void);

#endif
