//! The replicas of a controller: which to ask, and which next.

use crate::rich;
use std::collections::HashMap;
use std::net::SocketAddr;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Reason of a replica that does not lead.
const NOT_LEADER: &str = "NOT_LEADER";
/// Key of the leader's address among a refusal's metadata.
const LEADER: &str = "leader";
/// Most replicas that may be named.
const REPLICAS_MAX: usize = 9;

/// Replicas by address. Pure: it keeps no connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Controllers {
    replicas: Vec<String>,
    next: usize,
    /// Named by a replica that refused.
    leader: Option<String>,
}

impl Controllers {
    /// Reads `host:port,host:port`.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        let replicas: Vec<String> = text.split(',').map(|address| address.trim().to_owned()).collect();
        if let Some(bad) = replicas.iter().find(|address| !is_host_port(address)) {
            return Err(format!("must be host:port, or several with commas between, is `{bad}`"));
        }
        if replicas.len() > REPLICAS_MAX {
            return Err(format!("at most {REPLICAS_MAX} replicas may be named, are {}", replicas.len()));
        }
        Ok(Self { replicas, next: 0, leader: None })
    }

    /// A controller without replicas.
    pub fn one(address: SocketAddr) -> Self {
        Self { replicas: vec![address.to_string()], next: 0, leader: None }
    }

    /// Which to ask now.
    pub fn current(&self) -> &str {
        self.leader.as_deref().or(self.replicas.get(self.next).map(String::as_str)).unwrap_or_default()
    }

    /// Takes note that the current one refused or broke; whether the next is known to lead, so that there is nothing
    /// to wait for.
    pub fn failed(&mut self, status: &Status) -> bool {
        let named = leader_of(status).filter(|leader| leader != self.current());
        // Also after a leader that was named and does not answer: who named it knows no better.
        if named.is_none() {
            self.next = (self.next + 1) % self.replicas.len().max(1);
        }
        self.leader = named;
        self.leader.is_some()
    }
}

/// The refusal of a replica that does not lead.
pub fn not_leader(leader: Option<&str>) -> Status {
    let mut details = ErrorDetails::new();
    let known = leader.map(|leader| (LEADER.to_owned(), leader.to_owned()));
    details.set_error_info(NOT_LEADER, rich::DOMAIN, HashMap::from_iter(known));
    let message = match leader {
        Some(leader) => format!("this replica does not lead: ask {leader}"),
        None => "this replica does not lead, and knows none that does".into(),
    };
    Status::with_error_details(Code::FailedPrecondition, message, details)
}

fn leader_of(status: &Status) -> Option<String> {
    let info = status.get_details_error_info()?;
    let address = info.metadata.get(LEADER).filter(|_| info.reason == NOT_LEADER)?;
    is_host_port(address).then(|| address.clone())
}

/// Whether a text is an address with a port.
pub fn is_host_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_replica_that_breaks_is_followed_by_the_next_and_a_redirect_by_the_leader() {
        let mut controllers = Controllers::parse("a:1, b:2").unwrap();
        let broken = Status::unavailable("x");
        assert_eq!(controllers.current(), "a:1");
        assert!(!controllers.failed(&broken));
        assert_eq!(controllers.current(), "b:2");
        assert!(controllers.failed(&not_leader(Some("c:3"))));
        assert_eq!(controllers.current(), "c:3");
        // The leader is gone, or cannot be reached from here: whoever named it is not asked again at once.
        assert!(!controllers.failed(&broken));
        assert_eq!(controllers.current(), "a:1");
        assert!(!controllers.failed(&not_leader(None)));
        assert_eq!(controllers.current(), "b:2");
        // A replica that names itself does not lead either.
        assert!(!controllers.failed(&not_leader(Some("b:2"))));
        assert_eq!(controllers.current(), "a:1");
    }

    #[test]
    fn bad_addresses_are_named() {
        for (text, bad) in [("", "``"), ("a", "`a`"), ("a:1,", "``"), ("a:0", "`a:0`"), (":1", "`:1`")] {
            assert!(Controllers::parse(text).unwrap_err().contains(bad), "{text}");
        }
    }
}
