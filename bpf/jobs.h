// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/* What the engine does with flows, many in one call: to it a system call costs more
 * than the lookups. The jobs lie in memory that both share.
 */
#ifndef SNILB_JOBS_H
#define SNILB_JOBS_H

/* The entries of one job, as the table of its family has them. */
struct pair {
	void *table;
	const void *client, *backend; /* keys */
	const void *up, *down;	      /* values */
	int words;		      /* of the addresses in a value */
};

/* An address of a job is IPv4's in the last word, as everywhere (RFC 4291 2.5.5.2). */
static __always_inline struct flow4_key job_key4(const struct flow6_key *key)
{
	return (struct flow4_key){
		.saddr = key->saddr[3],
		.daddr = key->daddr[3],
		.sport = key->sport,
		.dport = key->dport,
		.leg = key->leg,
	};
}

static __always_inline struct flow4 job_value4(const struct flow6 *value)
{
	return (struct flow4){
		.flow = value->flow, .saddr = value->saddr[3], .daddr = value->daddr[3]};
}

/* Both entries or none, the backend's first: from the second on the flow is bound. */
static __always_inline int job_bind(const struct pair *p, bool replace)
{
	int err = bpf_map_update_elem(p->table, p->backend, p->down,
				      replace ? BPF_EXIST : BPF_NOEXIST);

	if (err)
		return err;
	err = bpf_map_update_elem(p->table, p->client, p->up, BPF_NOEXIST);
	if (err)
		bpf_map_delete_elem(p->table, p->backend);
	return err;
}

/* Whether an entry is of the job's flow, and not of a later connection from the same
 * client port. The addresses lie behind the flow.
 */
static __always_inline bool job_owns(const struct pair *p, const struct flow *found,
				     const struct flow *job)
{
	const __u32 *has = (const void *)(found + 1), *wants = (const void *)(job + 1);

	if (found->generation != job->generation || found->sport != job->sport ||
	    found->dport != job->dport)
		return false;
	for (int i = 0; i < p->words; i++)
		if (has[i] != wants[i])
			return false;
	return true;
}

/* Copies both flows out, and removes them if that is the job: each only if it is of
 * this flow. Two proxies may bring clients of one address and port, so even the
 * backend's may be another's by now.
 */
static __always_inline int job_read(const struct pair *p, struct flow_job *job)
{
	struct flow *up = bpf_map_lookup_elem(p->table, p->client);
	struct flow *down = bpf_map_lookup_elem(p->table, p->backend);
	bool owned = up && job_owns(p, up, p->up);
	bool back = down && down->generation == job->up.flow.generation;
	bool whole = owned && back;

	if (whole) {
		job->up.flow = *up;
		job->down.flow = *down;
	}
	if (job->op == FLOW_JOB_REMOVE) {
		if (owned)
			bpf_map_delete_elem(p->table, p->client);
		if (back)
			bpf_map_delete_elem(p->table, p->backend);
		return 0;
	}
	return whole ? 0 : -ENOENT;
}

static __always_inline int job_do(const struct pair *p, struct flow_job *job)
{
	if (job->op == FLOW_JOB_BIND || job->op == FLOW_JOB_REBIND)
		return job_bind(p, job->op == FLOW_JOB_REBIND);
	return job_read(p, job);
}

static __noinline int job_do4(struct flow_job *job)
{
	struct flow4_key client, backend;
	struct flow4 up, down;
	struct pair p = {&flows4, &client, &backend, &up, &down, 2};

	if (!job)
		return -EINVAL;
	client = job_key4(&job->client);
	backend = job_key4(&job->backend);
	up = job_value4(&job->up);
	down = job_value4(&job->down);
	return job_do(&p, job);
}

static __noinline int job_do6(struct flow_job *job)
{
	if (!job)
		return -EINVAL;

	struct pair p = {&flows6, &job->client, &job->backend, &job->up, &job->down, 8};

	return job_do(&p, job);
}

/* The engine's, one worker's jobs a call. */
SEC("syscall")
int snilb_jobs(struct flow_jobs_args *args)
{
	__u32 worker = args->worker, count = args->count, i;
	struct flow_jobs *all = bpf_map_lookup_elem(&jobs, &worker);

	if (!all)
		return -ENOENT;
	for (i = 0; i < FLOW_JOBS && i < count; i++) {
		struct flow_job *job = &all->job[i];

		job->result = job->family == AF_INET ? job_do4(job) : job_do6(job);
	}
	return 0;
}

#endif
