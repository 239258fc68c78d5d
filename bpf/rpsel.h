/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * What the selection program, user space and a pinned group agree on.
 *
 * The layout is the ABI of the pins: a change of a structure, of a bit or of
 * a map's type or size needs a new RPSEL_ABI.
 */
#ifndef RPSEL_H
#define RPSEL_H

#include <linux/types.h>

#define RPSEL_ABI 2

#define RPSEL_SLOTS 4096	/* listeners of one group, at most */
#define RPSEL_BUCKET 8		/* entries of one bucket: two cache lines */
#define RPSEL_FIRST_BUCKET 6	/* entries of the first bucket used before the second */
#define RPSEL_NO_SLOT 0xffff	/* an entry of the pick table with no listener */
#define RPSEL_FREEZE_SECONDS 10 /* a killed upgrade thaws by itself after this */
#define RPSEL_READ_SECONDS 5	/* a killed reader of reports is forgotten after this */

/* How far an entry of the flow table has come. A zeroed entry is empty. */
enum flow_state {
	FLOW_EMPTY = 0,
	FLOW_BUSY = 1,	      /* being inserted, by the CPU that marked it and nobody else */
	FLOW_NEW = 2,	      /* not confirmed: may be overwritten by another new flow */
	FLOW_ESTABLISHED = 3, /* confirmed: goes only when idle, flushed or orphaned */
};

/*
 * The word of an entry is all that ever changes while a flow lives, and always
 * by a 64-bit compare-and-exchange against the word that was read.
 *
 *   63       52 51         42 41   40 39           16 15       0
 *   +----------+-------------+-------+---------------+---------+
 *   |   slot   | incarnation | state |  last second  |   tag   |
 *   +----------+-------------+-------+---------------+---------+
 */
#define WORD_TAG_BITS 16
#define WORD_SECOND_SHIFT 16
#define WORD_SECOND_BITS 24
#define WORD_STATE_SHIFT 40
#define WORD_STATE_BITS 2
#define WORD_INCARNATION_SHIFT 42
#define WORD_INCARNATION_BITS 10
#define WORD_SLOT_SHIFT 52
#define WORD_SLOT_BITS 12

struct flow {
	__u64 identity;
	__u64 word;
};

struct bucket {
	struct flow flows[RPSEL_BUCKET];
};

/*
 * What a person wants to see of a flow, at the same index as its entry.
 *
 *   63      48 47                  24 23                      0
 *   +---------+----------------------+------------------------+
 *   |  port   |  since (this slot)   |  created (first seen)  |
 *   +---------+----------------------+------------------------+
 */
#define HISTORY_SINCE_SHIFT 24
#define HISTORY_PORT_SHIFT 48
#define SECOND_MASK 0xffffff

/*
 * By which hint a flow got its first listener: a flow with one has its listener
 * since that many seconds before it was created, which no other flow has.
 */
enum hint {
	HINT_NONE = 0,
	HINT_FIRST = 1, /* its packet said that it is new, while the group settled */
	HINT_FLOAT = 2, /* it followed the flow that its client had at another port */
};

struct detail {
	__u64 client[2]; /* IPv6 address in network order, IPv4 as ::ffff:a.b.c.d */
	__u64 history;
};

enum slot_state {
	SLOT_FREE = 0,
	SLOT_JOINING = 1, /* numbered, perhaps registered, without a share yet */
	SLOT_ACTIVE = 2,
	SLOT_DRAINING = 3, /* keeps its flows, gets no new one */
};

/* A slot lives as long as its group; its incarnation tells its listeners apart. */
struct slot {
	__u32 incarnation;
	__u32 state; /* enum slot_state; a dead listener is found by its empty SOCKARRAY entry */
};

/*
 * Who may serve when the pick table has no live listener: a bit per slot, by
 * rank. With policy newest a rank is a generation, else all that are active are
 * of the first.
 */
enum rank {
	RANK_NEXT = 0,	/* the generation that is about to take over; empty otherwise */
	RANK_FIRST = 1, /* gets new flows */
	RANK_SECOND = 2,
	RANK_OLDER = 3,
	RANK_DRAINING = 4, /* only when nobody else lives */
	RANKS = 5,
};

struct live {
	__u64 ranks[RANKS];
};

/* What a group waits for until the second config.until. */
enum waiting {
	NOT_WAITING = 0,
	SETTLING = 1, /* flows from before the attach are to be seen first */
	TURNING = 2,  /* the next generation is not complete */
};

/*
 * An entry of the pick table: who gets a new flow while the group waits
 * (low half: what the kernel's own hash would have picked, or the present
 * generation) and who after that (high half: joiners have their share here).
 * Either half may be RPSEL_NO_SLOT.
 */
#define PICK_AFTER_SHIFT 16
#define PICK_HALF 0xffff

/* Which part of the pick map is the table: entries [first, first + size). */
#define TABLE_FIRST_SHIFT 32

/*
 * The secret keys of the identities (key.h): random, and never changed. One is
 * added, and one for each word of what is hashed.
 */
#define KEY_WORDS 5
#define KEY_BYTES (4 * KEY_WORDS)

struct keys {
	__u64 high[KEY_WORDS + 1];
	__u64 low[KEY_WORDS + 1];
};

/* Set by user space while the program runs. */
struct config {
	__u64 table;	  /* first << TABLE_FIRST_SHIFT | size */
	__u32 abi;	  /* RPSEL_ABI */
	__u32 frozen;	  /* second in which a freeze began, 1 << 31 set; 0: none */
	__u32 until;	  /* second from which joiners get new flows */
	__u32 waiting;	  /* enum waiting; NOT_WAITING: that second lies in the past */
	__u32 idle;	  /* seconds an established flow may be silent */
	__u32 idle_new;	  /* seconds a new flow may be silent */
	__u32 policy;	  /* enum policy */
	__u32 affinity;	  /* enum affinity: fixed while attached */
	__u32 confirm;	  /* enum confirm: fixed while attached */
	__u32 capacity;	  /* flows the table was sized for */
	__u32 attached;	  /* second of the attach */
	__u32 clock_mult; /* as in the program: seconds = jiffies * clock_mult >> 32 */

	/* From here on of user space alone. */
	__u32 settled;	  /* second until which the group settled after the last attach */
	__u32 owner;	  /* uid whose processes may register through the agent */
	__u32 has_owner;  /* 0: nobody may */
	__u32 generation; /* the newest */
	__u32 members;	  /* the most that were active in it when one joined */
	__u32 serving;	  /* the generation that has new flows; while it waits: until then */
	__u64 joined;	  /* second of CLOCK_BOOTTIME in which the last of them joined */
	__u32 ruled;	  /* second since when the policy, or the settling, is this one */
	__u32 first;	  /* enum first: fixed while attached, and a constant of the program */

	/* Of the affinity, and fixed as that is. */
	__u32 prefix4;	 /* client: bits of an IPv4 address that count */
	__u32 prefix6;	 /* client: bits of an IPv6 address that count */
	__u32 offset;	 /* bytes: where in the payload */
	__u32 length;	 /* bytes: how many, 1 to KEY_BYTES */
	struct keys key; /* client, bytes, and with confirm reply flow */
};

#define FROZEN 0x80000000u

/* In a listener's weight: it is recorded, but the pick table may not have it yet. */
#define WEIGHT_UNDEALT 0x80000000u

/* Who gets a new flow. Untracked ones go by the pick table whatever the policy. */
enum policy {
	POLICY_HASH = 0,
	POLICY_NEWEST = 1, /* the newest generation; the pick table says who that is */
	POLICY_LEAST = 2,  /* of two candidates the one with fewer flows (TCP: connections) for its
			      weight */
	POLICY_RR = 3,	   /* each in turn, on each CPU */
	POLICY_RANDOM = 4,
	POLICY_CPU = 5, /* one that ran on this CPU, or node, when user space last looked */
};

/* How many flows a slot's present listener has; kept up with policy least alone. */
struct load {
	__u32 flows;
	__u32 recount; /* those in buckets that the present round of sweeps has been to */
};

/*
 * How many connections a slot's present TCP listener has open.
 *
 *   63                    32 31                     0
 *   +-----------------------+------------------------+
 *   |         open          |      incarnation       |
 *   +-----------------------+------------------------+
 */
#define CONNS_OPEN_SHIFT 32

struct conns {
	__u64 word;
	__u32 begun; /* changes that somebody set about, and those that are done */
	__u32 ended;
};

/* Whose a connection is: slot << OWNER_SLOT_SHIFT | incarnation. */
#define OWNER_SLOT_SHIFT 32

/* Of a note in moved_conns: who has the connection counts it already. */
#define OWNER_COUNTS (1ull << 63)

/* How many connections can have moved from a closing listener, and nobody looked yet. */
#define RPSEL_MOVED 8192

enum accepted_state {
	ACCEPTED_NOT_YET = 0, /* a listener, or a connection in its handshake */
	ACCEPTED_OPEN = 1,    /* counted */
	ACCEPTED_CLOSED = 2,
};

/* On the socket of a listener, and of each connection that it accepted. */
struct accepted {
	__u64 owner;
	__u32 state; /* enum accepted_state */
	__u32 pad;
};

/*
 * Who comes next, made by user space for each CPU: with policy rr all in turn, with
 * policy cpu those near it. It is empty where the pick table does it.
 */
#define RPSEL_ROW 256

struct row {
	__u64 size;
	__u16 slots[RPSEL_ROW];
};

enum affinity {
	AFFINITY_FLOW = 0,   /* client address and port, and local address */
	AFFINITY_NONE = 1,   /* every run is picked anew, nothing is tracked */
	AFFINITY_CLIENT = 2, /* client address, or a prefix of it */
	AFFINITY_BYTES = 3,  /* bytes of the payload; a packet too short for them: as FLOW */
};

/* By which protocol's packets a flow's first one may say where it belongs. */
enum first {
	FIRST_ANY = 0, /* packets say nothing */
	FIRST_OPENVPN = 1,
};

/*
 * A client, by address and by the number that a server gave it, wherever it sends
 * from. The value is a word of its listener, with the second in which an established
 * flow last had it, and a state and a tag of its own (hint.h).
 */
struct peer {
	__u64 client[2]; /* as in detail */
	__u32 id;
	__u32 pad;
};

enum confirm {
	CONFIRM_CLIENT = 0, /* the client's next packet, at least a second later */
	CONFIRM_REPLY = 1,  /* the server's answer; UDP, affinity FLOW or CLIENT */
};

/*
 * Counters, per CPU. Every run of the program is exactly one of hit, new,
 * rehomed, untracked, migrated (of the slot it selected) or fallback.
 */
struct slot_counters {
	__u64 hit;
	__u64 bytes; /* transport header and payload of all runs that selected the slot */
	__u64 new;
	__u64 rehomed;
	__u64 untracked;
	__u64 migrated;
};

struct counters {
	__u64 fallback;	   /* no live listener registered: the kernel picked */
	__u64 parse_error; /* of untracked: no ports, or no address to be read */
	__u64 table_full;  /* of untracked: no room */
	__u64 evicted;	   /* of new: took the place of another new flow */
};

/* Who reads reports. At most one process does, by a lock. */
struct reader {
	__u32 read; /* second in which it last said so, 1 << 31 set; 0: nobody */
	__u32 pad;
	__u64 dropped; /* reports that found the ring full */
};

enum report_kind {
	REPORT_NEW = 1,
	REPORT_ESTABLISHED = 2,
	REPORT_REHOME = 3,
	REPORT_EVICT = 4,  /* a new flow gave way to another one */
	REPORT_EXPIRE = 5, /* and its entry is empty, or another flow's */
};

struct report {
	__u64 client[2]; /* as in detail */
	__u64 at;	 /* ns of CLOCK_BOOTTIME */
	__u64 word;	 /* of the flow, as it is or (EVICT, EXPIRE) was */
	__u64 was;	 /* REHOME: its word before */
	__u16 port;
	__u8 kind; /* enum report_kind */
	__u8 pad[5];
};

/* What user space keeps of the listener in a slot. The program does not read it. */
struct listener {
	__u64 cookie;
	struct slot_counters base; /* the slot's counts when this listener joined */
	__u32 weight;		   /* share of new flows; 1 to 65535, and WEIGHT_UNDEALT */
	__u32 generation;	   /* which batch of processes it belongs to */
	__u32 pid;		   /* who held the socket when it joined */
	__u32 joined;		   /* second of the join */
	__u32 died;		   /* second in which it was found dead */
	__u32 dead;		   /* 1: died is set */
	__u64 started;		   /* when that process started, as in /proc/PID/stat; 0: unknown */
	__u64 cgroup;		   /* of its socket, where replies are looked for; 0: nowhere */
	__u8 command[16];
};

_Static_assert(sizeof(struct listener) == 112, "listener is part of the pinned ABI");
_Static_assert(sizeof(struct flow) == 16, "flow is part of the pinned ABI");
_Static_assert(sizeof(struct bucket) == 128, "a bucket is two cache lines");
_Static_assert(sizeof(struct detail) == 24, "detail is part of the pinned ABI");
_Static_assert(sizeof(struct peer) == 24, "peer is part of the pinned ABI");
_Static_assert(sizeof(struct slot) == 8, "slot is part of the pinned ABI");
_Static_assert(sizeof(struct reader) == 16, "reader is part of the pinned ABI");
_Static_assert(sizeof(struct report) == 48, "report is part of the pinned ABI");
_Static_assert(sizeof(struct row) == 520, "elements of an array are multiples of 8");
_Static_assert(sizeof(struct conns) == 16, "conns is part of the pinned ABI");
_Static_assert(sizeof(struct accepted) == 16, "accepted is part of the pinned ABI");
_Static_assert(sizeof(struct load) == 8, "load is part of the pinned ABI");
_Static_assert(sizeof(struct config) == 208, "config is part of the pinned ABI");
_Static_assert(1 << WORD_SLOT_BITS == RPSEL_SLOTS, "a slot number fits its field");
_Static_assert(WORD_SLOT_SHIFT + WORD_SLOT_BITS == 64, "the word is full");

#endif
