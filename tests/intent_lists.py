"""Two lists of messages: what asks for words, and what asks for a picture.

Over 200 each, written after the prompts of evaluation kits and how people talk to a chat with pictures; the last forty
of each came after the rules and did not shape all of them. Every message stands for itself. Questions are asked with a
picture at hand and without, those with "-" without; wishes have one where they begin with "+".
"""

QUESTIONS = [
    line.strip()
    for line in """
What is this?
What color is the background?
How many stars are there?
Is there a dog in the picture?
Describe the picture.
Describe this image in detail.
Give me a description of this image.
Give a short and clear explanation of the subsequent image.
Color of the background?
Give a very brief answer. What is this?
Give best answer to the following question. What does the man hold?
Generate a caption for this image.
Create a dense caption of the image.
Write a detailed description of the given image.
Convert the table in the image to markdown.
Convert the table to markdown
Draw a conclusion from the chart
Draw conclusions about the trend shown here.
Please generate a step by step answer, include all your intermediate reasoning process.
Fill in the blank: the dog is ___ the car.
Make a list of the objects
Put differently, what is this?
Change in revenue between 2019 and 2020?
Create a markdown table from the image.
Imagine you are a doctor. What do you see?
Imagine you are blind and I describe this to you. What would you ask first?
Generate the LaTeX code for this formula
Double check the number of stars
Just give the letter of the option.
Can you give a short introduction to this painting?
Can you make out what the sign says?
Could you tell me what kind of car this is?
Can you see a cat?
Can you describe the colors?
Would you call this a photo or a drawing?
Is this image a painting or a photograph?
Which of the two is larger, the star or the moon?
Who painted this picture?
Where is the dog?
When was this photo taken?
Why is the sky red here?
Name the animals in the picture.
Count the yellow stars.
List all objects with their colors.
Identify the object on the left.
Read the text in the image.
Transcribe the handwriting.
Translate the sign into English.
Summarize the image in one sentence.
Make a summary of this chart.
Turn the chart into a table.
Turn this image into a short story.
Turn the recipe in the photo into a shopping list.
Write a poem about this picture.
Write a haiku about the sunset in the photo.
Create a story about the dog.
Generate a title for this photo.
Generate five questions about the image.
Make up a name for this character.
Give three adjectives for the mood.
Give me the number of cars.
Give me the coordinates of the red car as a bounding box.
Give the bounding box of the dog.
Output the answer as JSON.
Create a JSON object with the colors and counts.
Generate alt text for this image.
Create alt text for a blind reader.
Make a guess: what will happen next?
Make sense of this picture for me.
Add up the numbers in the picture.
Add the two numbers shown.
Set up the equation for this triangle.
Show me how you know that.
Show your reasoning step by step.
Show me where the dog is.
Tell me about this image.
Tell me a joke about cats.
Explain the joke in this picture.
Explain what is drawn on the left.
Compare the two pictures.
Paint me a verbal portrait of what you see.
Sketch out in words what is going on here.
Illustrate your answer with an example from the chart.
Move on: what is the second object?
Place the events in order and answer with the letters.
Swap thoughts with me: what do you like about it?
Remove ambiguity: is the star left or right of the moon?
Replace the blank with the right word: the star is ____.
Put the answer in a single word: what color is the car?
Set aside the colors. How many shapes are there?
Crop yields rose in which year according to the chart?
Draw a comparison between the two charts.
Draw an analogy between this picture and a novel.
Draw my attention to anything unusual.
Picture this: you are the owner. What would you do first?
Picture quality: good or bad?
Image type: photo or drawing?
Photo or painting?
Left or right?
Red or blue?
Yes or no: is there a tree?
True or false: the image shows two dogs.
Answer the question using a single word or phrase. What is in the corner?
Answer with the option's letter from the given choices directly. A. cat B. dog
What is the color of the car? A. red B. blue C. green Answer with the option's letter.
Question: How many dogs are there? Options: A. one B. two. Please select the correct answer.
Hint: Please answer the question and provide the final answer at the end. Question: How many objects are left?
Is the following statement correct? The dog is left of the cat.
A man is holding an umbrella. What color is it?
A chart is shown. What was the highest value?
An image is given. Does it contain text?
Two stars and a moon are shown. Which one is larger?
The picture shows a city. Which one?
In the picture, what is above the star?
In one word, what is this?
Based on the image, what season is it?
According to the chart, which year was best?
Looking at the picture, how would you describe the mood?
I want to know what this is.
I need a description of this picture for my blog.
I'd like to know how many people are here.
I would like an explanation of the chart.
I want you to describe the scene.
I have a question about this picture.
Let me know what you see.
Help me understand this diagram.
Do you see any animals?
Does the image contain a face?
Are there more stars than moons?
Was this taken at night?
Should I change the background color?
Should I draw a bigger star?
How do I draw a cat?
How can I change the background of a photo?
How would you paint this scene?
What would you change about this picture?
What happens if I remove the red block?
What does the word "draw" mean?
Why did you make it blue?
Did you change the background?
Did you draw the star on the left?
What did you draw?
What is an edit?
Generate a one sentence description
Put the events in chronological order
Create an itinerary from this map
Convert this to text
Turn this into a tweet
give me your opinion
Give me the time shown on the clock
Add a caption to this image
Fill in the form
Set a price for this item
Name a color
Show me the largest number
Show me all red objects
Make a prediction
Make a diagnosis from the x-ray
Create a lesson plan
Create a prompt that would generate this image
Generate a prompt for Midjourney
Draw up a contract
Paint a picture in words
Give the total
Give an estimate of the height
Generate a rating
Provide a one-sentence caption for the provided image.
Give the difference between the two bars
Render a verdict on this outfit
Sketch the plot of this movie in a few words
Draw inferences from the graph
Change the subject: tell me about dogs
Make me laugh
Give me a break down of the chart
Give a rough idea of the size
Turn the diagram into pseudocode
Convert the graph to mermaid syntax
Make an inventory of the room
Give me some background on this painting
Add context to the picture
Create a persona for this person
Generate SEO keywords for this product photo
Give me the hex code of the background
make a haiku
Show me the steps to solve it
Place the correct option
Set the scene for me in two sentences
Move through the picture from left to right and name what you see
Color?
Colors in the image
Two things you notice
Another question: what is behind the car
An animal or a plant
Imagine this was a movie. Title it.
the dog is what breed
A or B
One last question about the image
Some people say it is fake. True?
a short answer please
the answer
Three facts about this animal
- What is the capital of France?
- Hello
- Hi, how are you?
- Thanks!
- Thank you, that is all.
- ok
- Write a poem about spring.
- Generate a list of ten animals.
- Create a short story about a dragon.
- Make a plan for my week.
- Give me a recipe for pancakes.
- Give me an idea for a birthday present.
- Show me a regular expression for email addresses.
- Show me an example of recursion in Python.
- Generate Python code for quicksort.
- Create a title and tags for this chat in JSON.
- ### Task: Generate a concise, 3-5 word title with an emoji summarizing the chat history.
- Suggest 3-5 relevant follow-up questions or prompts.
- A quick question before we start.
- An answer in one sentence, please.
- What can you do?
- What does the <img> tag do in HTML?
""".strip().splitlines()
]

WISHES = [
    line.strip()
    for line in """
draw three yellow stars
Draw a cat
please draw me a picture of a blue car
Draw me a dog.
Can you draw a house?
Could you please draw two green trees and a sun?
could you generate an image of two dogs?
Generate an image of a castle at night.
Generate a picture with a red bus on the left and a boat on the right.
generate a panda
Generate an image: a red house
create an image of a robot
Create a picture showing three apples.
create a green tree
Create a logo with a star.
create me an icon of a phone
make a picture of a lion
Make me a picture of a snowman
Make an image of two cups of coffee
make a drawing of a bicycle
produce an image of a mountain
Show me a cat
show me a picture of a frog
show me two pandas on a green background
Show a red apple above a banana
I want a picture of a panda
I want an image of a rocket.
I'd like a picture of a yellow flower
I would like to see a drawing of a horse
I would like you to draw a penguin
I need a picture of a clock.
I need an illustration of a bee for my website
i want to see a dragon
Let me see a picture of a whale
Let me see a tiger
give me a picture of a pizza
Give me an image with five stars
Give me a drawing of an owl
get me a photo of a beach
a red car
a blue car on a yellow background
three yellow stars
two dogs and a cat
A castle in the mountains, sunset, highly detailed
an astronaut riding a horse
a photo of an apple
a picture of a cat
a painting of a forest
Photo of a red bicycle leaning on a wall
picture of a sunflower
image of a moon over the sea
An icon of a house on white
five red hearts in a row
one green apple
a penguin left of a rocket
a star above a moon
a small yellow bird
Sketch a tree
Sketch a cat sleeping on a sofa
paint a sunset
Paint a portrait of a fox
illustrate a bee on a flower
render a glass of water
imagine a purple elephant
imagine an island in the sky
Draw the moon
Draw the same dog again
draw something beautiful
Draw anything you like
please paint a boat
hey, draw a shark
Hi! Can you make a picture of a bird for me?
ok now draw a train
now generate a picture of a snake
would you draw me a spider
will you draw a crown please
kindly draw a key
design a poster with a rocket
Design a logo of a fox
depict a knight and a dragon
another picture of a cat
a new image of a tree
new picture: a blue whale
visualize a city of the future
can I have a picture of a turtle?
can i see a drawing of a ladybug
may I get an image of an ice cream
draw: a lighthouse
generate: two rabbits
Draw a picture with the word HELLO on it
Could we have an illustration of a sheep?
+ draw a car
+ Draw a new picture of a dog
+ Make me a new picture of a dog
+ generate another image of a cat
+ Generate a picture of a house
+ show me a giraffe
+ please draw a boat instead
+ Change the background to pink
+ please make it blue
+ make it blue
+ Make the car red.
+ make the star bigger
+ make him smile
+ make them smaller
+ now add a star
+ add a hat
+ Add a red hat to the dog
+ add two more stars on the left
+ Add snow.
+ paint the car red
+ draw a hat on the dog
+ draw a line under the star
+ remove the tree
+ Remove the background
+ delete the left star
+ erase the dog
+ get rid of the moon
+ take away the cat
+ replace the dog with a cat
+ Replace the star by a moon.
+ swap the dog and the cat
+ swap the colors
+ turn the car blue
+ Turn the dog into a cat
+ turn it into a watercolor
+ turn this into a cartoon
+ change it to green
+ change the color of the car to yellow
+ Change her hair to blond
+ Can you change the background to white?
+ can you make it darker?
+ Could you remove the moon?
+ could you make the picture brighter please?
+ Would you add a sun in the corner?
+ I want the car to be red
+ I'd like the background to be blue
+ I would like it darker
+ move the star to the right
+ put a hat on the cat
+ Put the dog left of the house
+ place a flower in front of the house
+ insert a tree behind the car
+ give the dog a hat
+ Give it a red border
+ rotate it
+ flip the picture
+ mirror the image
+ crop it
+ enlarge the star
+ shrink the moon
+ recolor the flower in purple
+ color the sky orange
+ colour it green
+ fill the background with red
+ set the background to black
+ Edit the picture so that the star is red
+ convert it to black and white
+ Convert the photo to a pencil sketch
+ transform the dog into a robot
+ brighten it
+ blur the background
+ sharpen the image
+ double the number of stars
+ duplicate the star
+ undo
+ undo that
+ bigger
+ without the dog
+ with a hat
+ now with a blue background
+ in green please
+ as a watercolor painting
+ the same but in red
+ the background should be yellow
+ it should be purple
+ more stars
+ less red
+ a bit darker
+ no, the other one should be blue
Could you create something with a dinosaur in it?
Draw us a horse
Let's see a robot
A dragon flying over a castle, digital art
minimalist logo of a mountain
Please show a beach
I want you to paint a lake
+ make the sky pink
+ add sunglasses
+ put glasses on him
+ change his shirt to red
+ can you remove people in the background?
+ Please make the background blurry
+ make it look like winter
+ turn day into night
+ Make this black and white
+ let the dog wear a hat
+ zoom out
+ Remove all text
+ change the text to 'Hello'
+ the dog should wear a hat
+ I don't like the color, make it green
+ nice, but make the car red
+ great! now remove the car
+ try again
+ another one
Draw a table with four chairs
draw a man who is reading a book
Draw the letter A
A cozy cabin in the snow
draw a wolf howling at the moon, with mountains behind
could you show me what a unicorn looks like?
Create a fantasy landscape
make a birthday card with balloons
generate some clouds
I need a logo for my bakery
Design a t-shirt print with a skull
wallpaper with mountains
+ make everything darker
+ add more trees
+ give her blue eyes
+ use a red background
+ add a moon to the sky
+ can it be green?
+ please change it into a painting
+ remove her glasses
+ change style to anime
""".strip().splitlines()
]
