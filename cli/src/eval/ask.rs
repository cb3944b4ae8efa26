//! Questions to a served model, several at a time.

use crate::local::Gateway;
use anyhow::{Context, bail, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use tonic::{Code, Status};
use unmask_proto::v1::generate_request::Input;
use unmask_proto::v1::generate_response::Event;
use unmask_proto::v1::policy::{Autoregressive, Kind, SelfSpeculative, Threshold};
use unmask_proto::v1::{Decoding, GenerateRequest, ListModelsRequest, Model, Policy, TokenizeRequest};
use unmask_trainer::measure::{Point, Rule};

/// What is to be completed.
pub struct Question {
    /// Text before the answer.
    pub prompt: String,
    /// Text after it, for infill.
    pub suffix: Option<String>,
    /// Most tokens of the answer, where the question says; of a gap that is filled by masks it is the length.
    pub max_tokens: Option<u32>,
}

/// What the model wrote.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The answer.
    pub text: String,
    /// Tokens of it.
    pub tokens: u32,
    /// Forward passes, the prompt's left out.
    pub passes: u32,
    /// Why the question was not answered, if it was not: it is longer than the model's context, say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// A served model and how it is asked.
pub struct Asker {
    client: Gateway,
    /// The model.
    pub model: Model,
    /// Requests at once.
    pub streams: usize,
    /// The answer ends before the first of these.
    pub stop: Vec<String>,
    /// Longest answer; the model's default where absent.
    pub max_tokens: Option<u32>,
}

impl Asker {
    /// Finds the model: the named one, or the only one.
    ///
    /// # Errors
    /// The gateway does not answer, or does not serve it.
    pub async fn connect(mut client: Gateway, name: Option<&str>, streams: usize) -> anyhow::Result<Asker> {
        let listed = client.list_models(ListModelsRequest {}).await.context("cannot ask for the models")?;
        let models = listed.into_inner().models;
        let names: Vec<String> = models.iter().map(|model| model.name.clone()).collect();
        let mut found: Vec<Model> =
            models.into_iter().filter(|model| name.is_none_or(|name| name == model.name)).collect();
        ensure!(found.len() == 1, "--model must name one model that is served, of: {}", names.join(", "));
        Ok(Asker { client, model: found.remove(0), streams, stop: Vec::new(), max_tokens: None })
    }

    /// Answers in the order of the questions, decoded greedily at `point`; a question that is refused has none.
    ///
    /// # Errors
    /// The first failure.
    pub async fn ask(&self, questions: Vec<Question>, point: Point) -> anyhow::Result<Vec<Answer>> {
        let answer = async |question| match self.answer(question, point).await {
            Ok(answer) => Ok(answer),
            Err(error) => match error.downcast_ref::<Status>() {
                Some(status) if status.code() == Code::InvalidArgument => {
                    Ok(Answer { refused: Some(status.message().to_owned()), ..Answer::default() })
                }
                _ => Err(error),
            },
        };
        stream::iter(questions).map(answer).buffered(self.streams).try_collect().await
    }

    async fn answer(&self, question: Question, point: Point) -> anyhow::Result<Answer> {
        let autoregressive = point.block_size == 1;
        let tau = point.threshold;
        let kind = match point.rule {
            _ if autoregressive => Kind::Autoregressive(Autoregressive {}),
            Rule::SelfSpeculative => Kind::SelfSpeculative(SelfSpeculative { tau }),
            Rule::Threshold | Rule::JointEdit(_) => Kind::Threshold(Threshold { tau }),
        };
        let decoding = Decoding {
            policy: Some(Policy { kind: Some(kind) }),
            block_size: (!autoregressive).then_some(point.block_size),
            max_tokens: question.max_tokens.or(self.max_tokens),
            temperature: Some(0.0),
            seed: Some(0),
            stop: self.stop.clone(),
            ..Decoding::default()
        };
        let request = GenerateRequest {
            model: self.model.name.clone(),
            input: Some(Input::Text(question.prompt)),
            suffix: question.suffix,
            decoding: Some(decoding),
            ..GenerateRequest::default()
        };
        let mut events = self.client.clone().generate(request).await?.into_inner();
        let mut text = String::new();
        while let Some(message) = events.message().await? {
            match message.event {
                Some(Event::Commit(commit)) => text += &commit.text,
                Some(Event::Finish(finish)) => {
                    text += &finish.text;
                    let tokens = finish.usage.map_or(0, |usage| usage.completion_tokens);
                    return Ok(Answer { text, tokens, passes: finish.nfe, refused: None });
                }
                Some(Event::Started(_) | Event::Draft(_)) | None => {}
            }
        }
        bail!("the stream ended without a finish")
    }

    /// Tokens of a text.
    ///
    /// # Errors
    /// The gateway does not answer.
    pub async fn count(&self, text: &str) -> anyhow::Result<u32> {
        let request = TokenizeRequest { model: self.model.name.clone(), text: text.into(), ..Default::default() };
        Ok(self.client.clone().tokenize(request).await?.into_inner().ids.len() as u32)
    }
}
