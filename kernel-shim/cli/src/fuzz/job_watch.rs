//! Watches the jobs of the fuzzer: a sequence that does not come back is a finding, which would not
//! be reported otherwise.
//!
//! The machine itself stops an endless loop that passes points where CPUs take turns. A loop that
//! passes no such point can only be noticed from outside, by the time it takes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use mmu_hosted::Sequence;

/// What each job is at.
#[derive(Debug)]
pub(crate) struct JobWatch {
    jobs: Box<[Mutex<Job>]>,
}

#[derive(Debug, Default)]
struct Job {
    /// How many sequences the job has begun; another number means another sequence.
    begun: u64,
    running: Option<(u64, Sequence)>,
}

/// How long each job has been at its sequence. Counted in looks and not in time, because time
/// passes while the whole process is stopped.
#[derive(Debug)]
pub(crate) struct Looks(Vec<(u64, u64)>);

impl JobWatch {
    /// Nothing runs yet.
    pub(crate) fn new(jobs: usize) -> Self {
        Self { jobs: (0..jobs).map(|_| Mutex::default()).collect() }
    }

    /// `job` runs a sequence with this number from now on.
    pub(crate) fn begin(&self, job: usize, number: u64, sequence: &Sequence) {
        let mut job = lock(&self.jobs[job]);
        job.begun += 1;
        job.running = Some((number, sequence.clone()));
    }

    /// `job` runs nothing.
    pub(crate) fn end(&self, job: usize) {
        lock(&self.jobs[job]).running = None;
    }

    /// The first look is still to come.
    pub(crate) fn looks(&self) -> Looks {
        Looks(self.jobs.iter().map(|_| (0, 0)).collect())
    }

    /// Looks again: the sequence that a job has been at for more than `most` looks, if there is
    /// one.
    pub(crate) fn stuck(&self, Looks(looks): &mut Looks, most: u64) -> Option<(u64, Sequence)> {
        for (job, (begun, times)) in self.jobs.iter().zip(looks) {
            let job = lock(job);
            *times = if job.begun == *begun && job.running.is_some() { *times + 1 } else { 0 };
            *begun = job.begun;
            if *times > most {
                return job.running.clone();
            }
        }
        None
    }
}

fn lock(job: &Mutex<Job>) -> MutexGuard<'_, Job> {
    job.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use mmu_hosted::generate;

    use super::*;

    #[test]
    fn only_a_job_that_stays_at_one_sequence_is_stuck() {
        let watch = JobWatch::new(3);
        let mut looks = watch.looks();
        let sequence = generate(1, 2, 3);
        watch.begin(1, 40, &sequence);
        for number in 0..10 {
            watch.begin(0, number, &sequence);
            let stuck = watch.stuck(&mut looks, 5);
            assert_eq!(stuck.is_some(), number > 5, "look {number}");
            assert!(stuck.is_none_or(|(of, _)| of == 40));
        }
        watch.end(1);
        assert!((0..10).all(|_| watch.stuck(&mut looks, 10).is_none()), "what is done is not stuck");
    }
}
