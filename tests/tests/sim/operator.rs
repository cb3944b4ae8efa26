//! Whoever runs the cluster: changes policies, drains workers.

use crate::trace;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tonic::Status;
use tonic::transport::Endpoint;
use unmask_proto::controllers::Controllers;
use unmask_proto::network::Network;
use unmask_proto::v1::admin_service_client::AdminServiceClient;
use unmask_proto::v1::policy_intent::{FixedSettings, Kind};
use unmask_proto::v1::{DrainRequest, PolicyIntent, SetPolicyRequest};

/// How often an order is given until it is taken.
const TRIES: usize = 6;
const LIMIT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(300);

#[derive(Debug, Clone)]
pub enum Order {
    /// Settings of a model for requests that name none.
    Policy { model: String, block_size: u32, threshold: f64 },
    /// A worker finishes what it holds, and ends.
    Drain(String),
}

#[derive(Clone)]
pub struct Operator {
    pub network: Network,
    pub controllers: Controllers,
}

impl Operator {
    pub async fn give(mut self, at: Duration, order: Order) {
        sleep(at).await;
        for _ in 0..TRIES {
            let given = timeout(LIMIT, self.once(&order)).await;
            let status = match given {
                Ok(Ok(())) => {
                    trace::add("operator", vec![("order", format!("{order:?}"))]);
                    return;
                }
                Ok(Err(status)) => status,
                Err(_) => Status::unavailable("no answer"),
            };
            self.controllers.failed(&status);
            sleep(PAUSE).await;
        }
    }

    async fn once(&self, order: &Order) -> Result<(), Status> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.controllers.current()));
        let endpoint = endpoint.map_err(|error| Status::internal(error.to_string()))?;
        let channel = self.network.connect(&endpoint).await;
        let mut admin = AdminServiceClient::new(channel.map_err(|error| Status::unavailable(error.to_string()))?);
        match order.clone() {
            Order::Policy { model, block_size, threshold } => {
                let kind = Some(Kind::Fixed(FixedSettings {
                    block_size,
                    threshold: Some(threshold),
                    self_speculative: false,
                }));
                admin.set_policy(SetPolicyRequest { model, intent: Some(PolicyIntent { kind }) }).await?;
            }
            Order::Drain(worker_id) => {
                admin.drain(DrainRequest { worker_id }).await?;
            }
        }
        Ok(())
    }
}
