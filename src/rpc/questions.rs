//! The questions that were asked on one connection, by msgid. A question keeps its place until
//! its answer has come or the connection has ended, also if the asker has gone meanwhile: only
//! so is a silent peer noticed.

use std::collections::VecDeque;
use std::task::{Context, Poll, Waker};

use tokio::time::Instant;

use super::codec::Encoded;
use super::peer::HEDGE;
use crate::error::Error;

/// When an answer had arrived, and the answer.
pub(super) type Arrived = (Instant, Result<Encoded, Error>);

#[derive(Default)]
pub(super) struct Questions {
    first: u32, // the msgid of the question at the front
    queue: VecDeque<Question>,
    open: usize, // of the questions, those without an answer
}

enum Question {
    Asked(Instant, Option<Waker>),
    Forgotten(Instant), // asked, and the asker has gone
    Answered(Instant, Result<Encoded, Error>),
    Done,
}

impl Questions {
    /// Takes up a question that is asked now; its msgid.
    pub(super) fn ask(&mut self, now: Instant) -> u32 {
        self.open += 1;
        self.push(Question::Asked(now, None))
    }

    /// Takes up a question that is not sent, with its answer; its msgid.
    pub(super) fn refuse(&mut self, now: Instant, error: Error) -> u32 {
        self.push(Question::Answered(now, Err(error)))
    }

    fn push(&mut self, question: Question) -> u32 {
        let place = u32::try_from(self.queue.len()).unwrap_or(u32::MAX);
        self.queue.push_back(question);
        self.first.wrapping_add(place)
    }

    /// How many wait for an answer.
    pub(super) fn open(&self) -> usize {
        self.open
    }

    /// The answer to a question; until it comes, this task is woken for it.
    pub(super) fn poll(&mut self, id: u32, context: &Context<'_>) -> Poll<Arrived> {
        let Some(question) = self.at(id) else {
            return Poll::Pending;
        };
        if let Question::Asked(_, waker) = question {
            match waker {
                Some(waker) => waker.clone_from(context.waker()),
                None => *waker = Some(context.waker().clone()),
            }
            return Poll::Pending;
        }
        match std::mem::replace(question, Question::Done) {
            Question::Answered(arrived, answer) => {
                self.tidy();
                Poll::Ready((arrived, answer))
            }
            _ => Poll::Pending,
        }
    }

    /// The asker has gone: its answer is not kept.
    pub(super) fn forget(&mut self, id: u32) {
        if let Some(question) = self.at(id) {
            *question = match question {
                Question::Asked(at, _) => Question::Forgotten(*at),
                _ => Question::Done,
            };
            self.tidy();
        }
    }

    /// Notes an answer and gives back its asker's task. An error means that this was no open
    /// question.
    pub(super) fn answer(&mut self, id: u32, arrived: Arrived) -> Result<Option<Waker>, ()> {
        let question = self.at(id).ok_or(())?;
        if matches!(question, Question::Answered(..) | Question::Done) {
            return Err(());
        }
        let waker = question.end(arrived);
        self.open -= 1;
        self.tidy();
        Ok(waker)
    }

    /// Answers all open questions alike, and gives back the tasks of their askers.
    pub(super) fn answer_all(&mut self, now: Instant, error: &Error) -> Vec<Waker> {
        let open = self
            .queue
            .iter_mut()
            .filter(|question| matches!(question, Question::Asked(..) | Question::Forgotten(_)));
        let wakers = open.filter_map(|question| question.end((now, Err(error.clone()))));
        let wakers = wakers.collect();
        self.open = 0;
        self.tidy();
        wakers
    }

    /// When the oldest open question was asked, and the tasks whose answers are late: a task is
    /// woken once for that, so that it may ask another node too.
    pub(super) fn late(&mut self, now: Instant) -> (Option<Instant>, Vec<Waker>) {
        let (mut oldest, mut late) = (None, Vec::new());
        for question in &mut self.queue {
            let (Question::Asked(at, _) | Question::Forgotten(at)) = *question else {
                continue;
            };
            oldest = oldest.or(Some(at));
            if now - at < HEDGE {
                break;
            }
            if let Question::Asked(_, waker) = question {
                late.extend(waker.take());
            }
        }
        (oldest, late)
    }

    fn at(&mut self, id: u32) -> Option<&mut Question> {
        let place = id.wrapping_sub(self.first) as usize;
        self.queue.get_mut(place)
    }

    /// Lets go of the questions at the front that need no place any more.
    fn tidy(&mut self) {
        while let Some(Question::Done) = self.queue.front() {
            self.queue.pop_front();
            self.first = self.first.wrapping_add(1);
        }
    }
}

impl Question {
    /// Ends an open question with its answer, unless the asker has gone.
    fn end(&mut self, (arrived, answer): Arrived) -> Option<Waker> {
        let ended = match self {
            Question::Asked(..) => Question::Answered(arrived, answer),
            _ => Question::Done,
        };
        match std::mem::replace(self, ended) {
            Question::Asked(_, waker) => waker,
            _ => None,
        }
    }
}
