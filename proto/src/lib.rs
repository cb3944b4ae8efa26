//! The wire protocol of unmask, package `unmask.v1`, generated from `unmask/v1/*.proto`.
//!
//! It knows messages and services. It does not know what a value means: validation belongs to whoever
//! receives a message.
//!
//! Modules in reading order: [`v1`] (generated), [`DESCRIPTORS`] (for reflection), [`rich`] (errors as
//! section "Errors" of the public interface wants them), [`controllers`] (which replica of a controller to
//! ask), [`timeout`] (how long a call may take), [`network`] (how services reach each other), [`tls`] (certificates),
//! [`watch`] (a value that tasks wait for), [`failpoints`] (bugs to look for).

pub mod controllers;
pub mod failpoints;
pub mod network;
pub mod rich;
pub mod timeout;
pub mod tls;
pub mod watch;

/// Package `unmask.v1`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod v1 {
    tonic::include_proto!("unmask.v1");
}

/// Encoded `FileDescriptorSet` of the package, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/unmask.bin"));
