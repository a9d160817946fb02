/* A load generator that costs little beside what it asks: load HOST PORT --path P --body FILE --connections K
   (--requests N | --seconds S) [--spread-ms M]. Each connection is kept and sends the next request as soon as the last answer
   is whole; the first ones are spread over M ms. Prints one line of JSON, times in ms. One thread, one epoll. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HEAD_BYTES 8192
enum part { HEAD, COUNTED, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILER, WHOLE, BROKEN };

struct connection {
    int fd, status, closes; /* closes: the server said that it ends the connection with this answer */
    enum part part;
    size_t have, left, line; /* left: of the body or chunk; line: bytes of a line of framing so far */
    long long sent, last;    /* when the request was sent and when a part of the body was read last; 0: not yet */
    char head[HEAD_BYTES];
};

struct samples {
    float *ms;
    size_t count, room;
};

static struct samples first, gap, all;
static struct sockaddr_in server;
static char *request;
static size_t request_bytes;
static long requests, failed, begun, most, body_bytes;
static int poller;

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static const char *flag(int argc, char **argv, const char *name, const char *otherwise) {
    for (int i = 1; i + 1 < argc; i++)
        if (!strcmp(argv[i], name)) return argv[i + 1];
    return otherwise;
}

static void give_up(const char *what) {
    perror(what);
    exit(1);
}

static void note(struct samples *s, long long from, long long to) {
    if (s->count == s->room) {
        s->room = s->room ? 2 * s->room : 4096;
        s->ms = realloc(s->ms, s->room * sizeof *s->ms);
        if (s->ms == NULL) give_up("cannot keep the samples");
    }
    s->ms[s->count++] = (float)((to - from) / 1e6);
}

static int by_size(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Nearest rank, of sorted samples. */
static double quantile(const struct samples *s, double share) {
    if (s->count == 0) return 0;
    size_t rank = (size_t)(share * s->count);
    if (rank < share * s->count) rank++;
    return s->ms[rank ? rank - 1 : 0];
}

static void connect_anew(struct connection *c) {
    int yes = 1;
    if (c->fd >= 0) close(c->fd);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&server, sizeof server)) give_up("cannot connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event);
}

static void ask(struct connection *c) {
    if (most && begun >= most) return;
    begun++;
    c->part = HEAD;
    c->have = c->line = c->closes = 0;
    c->last = 0;
    c->sent = now_ns();
    if (send(c->fd, request, request_bytes, MSG_NOSIGNAL) != (ssize_t)request_bytes) shutdown(c->fd, SHUT_RDWR);
}

static void read_head(struct connection *c) {
    const char *length = strcasestr(c->head, "\r\nContent-Length:");
    c->status = atoi(c->head + 9);
    c->closes = strcasestr(c->head, "\r\nConnection: close") != NULL;
    if (length) {
        c->left = strtoul(length + 17, NULL, 10);
        c->part = c->left ? COUNTED : WHOLE;
    } else
        c->part = strcasestr(c->head, "\r\nTransfer-Encoding: chunked") ? CHUNK_SIZE : BROKEN;
    c->left = length ? c->left : 0;
}

/* How many of ``bytes`` are body; ``part`` moves on. */
static size_t read_some(struct connection *c, const char *bytes, size_t count) {
    size_t body = 0;
    for (size_t i = 0; i < count && c->part != WHOLE && c->part != BROKEN;) {
        if (c->part == COUNTED || c->part == CHUNK) {
            size_t some = count - i < c->left ? count - i : c->left;
            body += some, i += some, c->left -= some;
            if (c->left == 0) c->part = c->part == COUNTED ? WHOLE : CHUNK_END;
            continue;
        }
        char byte = bytes[i++];
        if (c->part == HEAD) {
            c->head[c->have++] = byte;
            c->head[c->have] = 0;
            if (c->have >= 4 && !memcmp(c->head + c->have - 4, "\r\n\r\n", 4)) read_head(c);
            else if (c->have == HEAD_BYTES - 1) c->part = BROKEN;
        } else if (byte != '\n') {
            if (byte == '\r') continue;
            c->line++;
            if (c->part == CHUNK_SIZE) c->left = 16 * c->left + (byte <= '9' ? byte - '0' : (byte | 32) - 'a' + 10);
        } else { /* the end of a line of framing */
            if (c->part == CHUNK_SIZE) c->part = c->left ? CHUNK : TRAILER;
            else if (c->part == CHUNK_END) c->part = CHUNK_SIZE;
            else if (c->line == 0) c->part = WHOLE;
            c->line = 0;
        }
    }
    return body;
}

static void take(struct connection *c) {
    static char bytes[1 << 18];
    ssize_t got = recv(c->fd, bytes, sizeof bytes, 0);
    long long now = now_ns();
    size_t body = got > 0 ? read_some(c, bytes, got) : 0;
    if (body) {
        if (c->last) note(&gap, c->last, now);
        else note(&first, c->sent, now);
        c->last = now;
        body_bytes += body;
    }
    if (got > 0 && c->part != WHOLE && c->part != BROKEN) return;
    int good = got > 0 && c->part == WHOLE && c->status == 200;
    if (good) note(&all, c->sent, now);
    requests += good;
    failed += !good;
    if (got <= 0 || c->part == BROKEN || c->closes) connect_anew(c);
    ask(c);
}

static void read_request(int argc, char **argv) {
    static char body[1 << 16];
    FILE *file = fopen(flag(argc, argv, "--body", "/dev/null"), "r");
    if (file == NULL) give_up("cannot read the body");
    size_t length = fread(body, 1, sizeof body, file);
    fclose(file);
    request_bytes = asprintf(&request, "POST %s HTTP/1.1\r\nHost: %s:%s\r\nContent-Type: application/json\r\nAccept: */*\r\n"
                             "Content-Length: %zu\r\n\r\n%.*s", flag(argc, argv, "--path", "/"), argv[1], argv[2], length,
                             (int)length, body);
}

static void tell(double seconds) {
    struct samples *each[] = {&first, &gap, &all};
    for (int i = 0; i < 3; i++) qsort(each[i]->ms, each[i]->count, sizeof(float), by_size);
    printf("{\"requests\":%ld,\"failed\":%ld,\"seconds\":%.6f,\"rps\":%.2f,\"body_bytes\":%ld,", requests, failed, seconds,
           requests / seconds, body_bytes);
    printf("\"first_p50\":%.4f,\"first_p99\":%.4f,\"first_max\":%.4f,", quantile(&first, .5), quantile(&first, .99),
           quantile(&first, 1));
    printf("\"gap_p50\":%.4f,\"gap_p99\":%.4f,\"gap_max\":%.4f,", quantile(&gap, .5), quantile(&gap, .99), quantile(&gap, 1));
    printf("\"whole_p50\":%.4f,\"whole_p99\":%.4f,\"whole_max\":%.4f}\n", quantile(&all, .5), quantile(&all, .99),
           quantile(&all, 1));
}

int main(int argc, char **argv) {
    if (argc < 3) return fputs("load HOST PORT --path P --body FILE --connections K (--requests N | --seconds S)\n", stderr), 2;
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(argv[2]))};
    if (inet_pton(AF_INET, argv[1], &server.sin_addr) != 1) return fputs("HOST must be an IPv4 address\n", stderr), 2;
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_TIMERSLACK, 1UL);
    read_request(argc, argv);
    int count = atoi(flag(argc, argv, "--connections", "1")), asked = 0;
    most = atol(flag(argc, argv, "--requests", "0"));
    double seconds = atof(flag(argc, argv, "--seconds", "1e9"));
    long long spread = atoll(flag(argc, argv, "--spread-ms", "0")) * 1000000LL;
    struct connection *connections = calloc(count, sizeof *connections);
    poller = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 0; i < count; i++) {
        connections[i].fd = -1;
        connect_anew(&connections[i]);
    }
    long long began = now_ns(), until = began + (long long)(seconds * 1e9), now = began;
    while (now < until && !(most && requests + failed >= most)) {
        struct epoll_event found[256];
        while (asked < count && now - began >= spread * asked / count) ask(&connections[asked++]);
        int ready = epoll_wait(poller, found, 256, asked < count ? 1 : 100);
        for (int i = 0; i < ready; i++) take(found[i].data.ptr);
        now = now_ns();
    }
    tell((now - began) / 1e9);
}
